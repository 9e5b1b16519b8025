#!/usr/bin/env python
"""Whether DiAD rebuilds or copies: its reconstruction's error inside synthetic defects against the error outside.

```bash
python tests/benchmarks/evaluate_rebuilding.py MODEL --data DATA --output runs/rebuilding
```

Defects of all kinds (`diffad/data/synthetic_defects.py`) are drawn on good test images, which the networks have not
seen. The error is the mean absolute difference of image and reconstruction, pixels in [0, 1], at the processing
resolution. A copy has the same inside and outside. Two ratios stand beside it: what the autoencoder alone makes of the
image with the defect, and of the good image, which is the best that a reconstruction could be. Over all pixels the
broad kinds count most (uneven light and dull regions have 6 to 7 of 10 pixels), so the mean of the kinds' ratios is
printed as well.
`rebuilding.json` and a sheet of each category are written: good image, with a defect, reconstruction, error.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffad import DiADPipeline
from diffad.data import load_anomaly_dataset
from diffad.data.synthetic_defects import add_defects
from diffad.files import write_text_whole
from diffad.images import ImageSequence, denormalize_images, normalize_images
from diffad.pipelines.detection import spread
from diffad.seeding import image_generator
from diffad.visualization import heat_map, save_rows, to_uint8

BATCH_SIZE, NUM_ROWS = 8, 12
WHAT = ("reconstruction", "autoencoder", "perfect repair")
KINDS_ALIKE = ", kinds alike"


@torch.no_grad()
def rebuild(pipeline: DiADPipeline, images: torch.Tensor, first: int, seed: int) -> torch.Tensor:
    """Reconstructions of images, both (N, 3, R, R) in [0, 1]."""
    generators = [image_generator(seed, first + i) for i in range(len(images))]
    rebuilt = pipeline.reconstruct(images.to(pipeline.device) * 2.0 - 1.0, generators)
    return (rebuilt / 2.0 + 0.5).clamp(0.0, 1.0).cpu()


@torch.no_grad()
def decode_encoded(pipeline: DiADPipeline, images: torch.Tensor) -> torch.Tensor:
    """What the autoencoder alone makes of images, both (N, 3, R, R) in [0, 1]."""
    statistics = (pipeline.config.image_mean, pipeline.config.image_std)
    pixel_values = normalize_images(images.to(pipeline.device) * 2.0 - 1.0, *statistics)
    decoded = denormalize_images(pipeline.decode(pipeline.encode(pixel_values)), *statistics)
    return (decoded / 2.0 + 0.5).clamp(0.0, 1.0).cpu()


def evaluate_category(
    pipeline: DiADPipeline, good: Any, defects_an_image: int, seed: int, sheet: Path
) -> dict[str, float]:
    """Ratios of the errors: over all pixels of all images, of each kind of defect, and the mean of the kinds'."""
    side = (pipeline.processing_resolution,) * 2
    rows = ImageSequence.of_rows(good["image"], range(len(good)), pipeline.value_range).resized(side)
    pictures = [row[0].clamp(0.0, 1.0).permute(1, 2, 0).numpy() for row in rows]
    drawn = list(add_defects(pictures, defects_an_image, seed))
    sums: dict[str, np.ndarray] = defaultdict(lambda: np.zeros((2, 2)))  # error and pixels, of outside and inside
    good_images = torch.stack([torch.from_numpy(picture).permute(2, 0, 1) for picture in pictures])
    repaired = torch.cat([decode_encoded(pipeline, few) for few in good_images.split(BATCH_SIZE)])
    shown = []
    for start in range(0, len(drawn), BATCH_SIZE):
        batch = drawn[start : start + BATCH_SIZE]
        images = torch.stack([torch.from_numpy(defect.image).permute(2, 0, 1) for _, defect in batch])
        rebuilt, decoded = rebuild(pipeline, images, start, seed), decode_encoded(pipeline, images)
        for i, (number, defect) in enumerate(batch):
            for what, other in zip(WHAT, (rebuilt[i], decoded[i], repaired[number]), strict=True):
                error = (other - images[i]).abs().mean(dim=0).numpy()  # (R, R)
                for name in (what, f"{what} {defect.kind}"):
                    for inside in (0, 1):
                        chosen = error[defect.mask == bool(inside)]
                        sums[name][:, inside] += chosen.sum(), chosen.size
            if len(shown) < NUM_ROWS:
                row = (good_images[number], images[i], rebuilt[i])
                error_map = heat_map((rebuilt[i] - images[i]).abs().mean(dim=0))
                shown.append([*(to_uint8(picture * 2.0 - 1.0) for picture in row), error_map])
    save_rows(shown, sheet, ["good", "with a defect", "reconstruction", "error"])
    means = {name: error / pixels for name, (error, pixels) in sums.items()}
    ratios = {name: float(inside / outside) for name, (outside, inside) in means.items()}
    of_kinds = {what: [ratios[name] for name in ratios if name.startswith(f"{what} ")] for what in WHAT}
    return ratios | {f"{what}{KINDS_ALIKE}": float(np.mean(of_kinds[what])) for what in WHAT}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", help="folder or Hub id of a DiADPipeline")
    parser.add_argument("--data", required=True, help="data set with good test images")
    parser.add_argument("--output", type=Path, required=True, help="gets rebuilding.json and the sheets")
    parser.add_argument("--category", help="of the data (all)")
    parser.add_argument("--max_images", type=int, default=12, help="good images of a category (12)")
    parser.add_argument("--defects_an_image", type=int, default=6, help="(6)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    pipeline = DiADPipeline.from_pretrained(args.model).to("cuda" if torch.cuda.is_available() else "cpu")
    pipeline.set_progress_bar_config(disable=True)
    test = load_anomaly_dataset(args.data, split="test", category=args.category)
    labels, categories = np.asarray(test["label"]), np.asarray(test["category"])
    ratios = {}
    for category in dict.fromkeys(categories.tolist()):
        rows = np.flatnonzero((labels == 0) & (categories == category))
        good = test.select([int(rows[i]) for i in spread(range(len(rows)), args.max_images)])
        sheet = args.output / f"{category}.png"
        ratios[category] = evaluate_category(pipeline, good, args.defects_an_image, args.seed, sheet)
        chosen = {name: ratios[category][name] for what in WHAT for name in (what, f"{what}{KINDS_ALIKE}")}
        shown = "; ".join(f"{name} {ratio:.1f}" for name, ratio in chosen.items())
        print(f"{category}: error inside the defects, as a multiple of that outside: {shown}", flush=True)
    write_text_whole(args.output / "rebuilding.json", json.dumps({**vars(args), "ratios": ratios}, default=str) + "\n")


if __name__ == "__main__":
    main()
