#!/usr/bin/env python
"""Makes a data set to choose settings by: defects drawn on good images that a model's training held out.

    python tests/benchmarks/draw_defects.py runs/diad --output runs/drawn
    accelerate launch training/make_table.py --table positions --model runs/diad --data runs/drawn

An MVTec-AD tree: the images that the training saw are its training split, those that it held out its good test images,
and the same with defects of all kinds (`diffad/data/synthetic_defects.py`) its defective ones. So whatever is measured
on a test split is measured against drawn defects, and no test image is looked at.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from diffad.data.synthetic_defects import add_defects
from diffad.images import ImageSequence
from diffad.pipelines.detection import spread
from diffad.training.data import hold_out, read_good_images


def write_image(pixels: np.ndarray, path: Path) -> None:
    """Values in [0, 1] as a PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((pixels * 255.0).round().astype(np.uint8)).save(path)


def pictures(images: Any, chosen: Sequence[int], side: int, value_range: float | None) -> Iterator[np.ndarray]:
    """(side, side, 3) float32 in [0, 1]."""
    for row in ImageSequence.of_rows(images["image"], chosen, value_range).resized((side, side)):
        yield row[0].clamp(0.0, 1.0).permute(1, 2, 0).numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", type=Path, help="folder that a training wrote")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--resolution", type=int, default=256, help="pixels a side (256)")
    parser.add_argument("--max_images", type=int, default=60, help="good images of a category to draw on (60)")
    parser.add_argument("--defects_an_image", type=int, default=4, help="(4)")
    options = parser.parse_args()
    args = argparse.Namespace(**json.loads((options.model / "training.json").read_text())["arguments"])
    if options.output.exists():
        parser.error(f"--output: {options.output} is there already. Give a new folder, so that no older image is left.")
    if args.calibration_fraction is None:
        parser.error("the model has seen all good images. Fit it with `--calibration_fraction 0.2`.")
    training, held_out, categories = hold_out(read_good_images(args), args)
    for category in categories:
        folder = options.output / category
        seen, unseen = (
            one.select(np.flatnonzero(np.asarray(one["category"]) == category)) for one in (training, held_out)
        )
        for i, picture in enumerate(pictures(seen, range(len(seen)), options.resolution, args.value_range)):
            write_image(picture, folder / "train" / "good" / f"{i:03}.png")
        chosen = spread(range(len(unseen)), options.max_images)
        good = list(pictures(unseen, chosen, options.resolution, args.value_range))
        for i, picture in enumerate(good):
            write_image(picture, folder / "test" / "good" / f"{i:03}.png")
        for number, (i, defect) in enumerate(add_defects(good, options.defects_an_image, args.seed)):
            kind, name = defect.kind.replace(" ", "_"), f"{i:03}_{number:04}"
            write_image(defect.image, folder / "test" / kind / f"{name}.png")
            write_image(defect.mask * 1.0, folder / "ground_truth" / kind / f"{name}_mask.png")
        print(f"{category}: {len(seen)} seen, {len(good)} held out", flush=True)


if __name__ == "__main__":
    main()
