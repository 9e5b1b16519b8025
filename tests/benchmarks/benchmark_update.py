"""`diffad update` against a fit to old and new images together: what differs, how long it takes, what it keeps.

    python tests/benchmarks/benchmark_update.py --good bottle/train/good --test bottle/test

Every other good image is fitted, and the rest learned by an update. Maps, scores, p-values and thresholds are compared
on the test images.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from diffad import AnomalyDenoisePipeline
from diffad.reading.inputs import find_images


def run(*arguments: object) -> float:
    """Runs a command of diffad; its seconds."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "diffad.cli", *map(str, arguments)], check=True, capture_output=True)
    return time.perf_counter() - started


def mib(paths: list[Path]) -> float:
    return sum(path.stat().st_size for path in paths if path.is_file()) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--good", type=Path, required=True, help="folder of good images")
    parser.add_argument("--test", type=Path, required=True, help="folder of images to compare on")
    parser.add_argument("--kept-images", type=int, default=200, help="K (200)")
    parser.add_argument("--count", type=int, default=40, help="test images, spread over all (40)")
    args = parser.parse_args()
    images = find_images([args.good])
    with tempfile.TemporaryDirectory() as work:
        old, new, updated, together, plain = (Path(work, name) for name in ("old", "new", "updated", "both", "plain"))
        for folder, chosen in ((old, images[::2]), (new, images[1::2])):
            folder.mkdir()
            for path in chosen:
                (folder / path.name).symlink_to(path.resolve())
        options = ("--false-alarm-rate", 0.05)
        kept = ("--kept-images", args.kept_images)
        fit_old = run("fit", old, "--output", updated, *options, *kept)
        update = run("update", updated, "--data", new)
        fit_both = run("fit", args.good, "--output", together, *options, *kept)
        fit_plain = run("fit", args.good, "--output", plain, *options)
        [memory] = updated.glob("good_images-*")
        model = mib([path for path in updated.rglob("*") if path != memory])
        print(
            f"{len(images)} images: fit to {len(images[::2])} {fit_old:.1f} s, update by {len(images[1::2])} "
            f"{update:.1f} s, fit to all {fit_both:.1f} s, without --kept-images {fit_plain:.1f} s; the model has "
            f"{model:.0f} MiB, and what it keeps {mib([memory]):.0f} MiB",
            flush=True,
        )
        found = find_images([args.test])
        found = [found[i * len(found) // args.count] for i in range(args.count)]
        outputs = []
        for folder in (updated, together):
            pipeline = AnomalyDenoisePipeline.from_pretrained(folder)
            pipeline.set_progress_bar_config(disable=True)
            calibration = pipeline.calibration
            thresholds = [float(calibration.image_threshold[0]), float(calibration.pixel_threshold[0])]
            output = pipeline(found)
            outputs.append((output.anomaly_map, output.anomaly_score, output.p_value, np.array(thresholds)))
        for name, one, other in zip(("maps", "scores", "p-values", "thresholds"), *outputs, strict=True):
            print(f"{name}: up to {np.abs(other).max():.4g}, differ by at most {np.abs(one - other).max():.2g}")


if __name__ == "__main__":
    main()
