"""Peak memory of fitting `GaussianFeatureModel` does not grow with the images.

    python tests/benchmarks/benchmark_gaussian_memory.py

Fits EfficientNet-lite0 at 224 px to 100 and to 600 image files, each in a process of its own, so that the peak memory
is its own too.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from PIL import Image

from diffad import GaussianFeatureModel
from diffad.images import images_to_pixel_values, images_to_tensors

SIZE = 224


def write_textures(folder: Path, count: int) -> None:
    """Striped parts under noise."""
    stripes = 0.6 + 0.2 * np.sin(2.0 * np.pi * np.arange(SIZE) / 16.0)
    for i in range(count):
        noise = 0.05 * np.random.default_rng(i).standard_normal((SIZE, SIZE, 3))
        pixels = (stripes[None, :, None] + noise).clip(0.0, 1.0) * 255.0
        Image.fromarray(pixels.round().astype(np.uint8)).save(folder / f"{i:04}.png", compress_level=1)


def peak_mib() -> float:
    unit = 2**20 if sys.platform == "darwin" else 2**10  # ru_maxrss is in bytes there, in KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def measure(folder: Path, num_images: int, batch_size: int) -> None:
    """Prints the peak memory of this process once it has fitted the folder's first images."""
    files = sorted(folder.glob("*.png"))[:num_images]
    model = GaussianFeatureModel.from_backbone(image_size=SIZE)
    batches = (
        images_to_pixel_values(images_to_tensors(files[i : i + batch_size]), (SIZE, SIZE))
        for i in range(0, len(files), batch_size)
    )
    model.fit(batches)
    print(f"{int(model.num_images[0])} {peak_mib():.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-images", type=int, nargs="+", default=[100, 600], help="of each fit (100 600)")
    parser.add_argument("--batch-size", type=int, default=16, help="images in one pass (16)")
    parser.add_argument("--folder", type=Path, help="only fit this folder's images, in this process")
    args = parser.parse_args()
    torch.set_num_threads(1)  # as many buffers on every machine
    if args.folder is not None:
        measure(args.folder, args.num_images[0], args.batch_size)
        return
    peaks = []
    with TemporaryDirectory() as folder:
        write_textures(Path(folder), max(args.num_images))
        for count in args.num_images:
            command = [sys.executable, __file__, "--folder", folder, "--num-images", str(count)]
            command += ["--batch-size", str(args.batch_size)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            fitted, peak = done.stdout.split()
            peaks.append(float(peak))
            print(f"{fitted} images of {SIZE} x {SIZE}: peak {peaks[-1]:.0f} MiB", flush=True)
    print(f"ratio of the last to the first: {peaks[-1] / peaks[0]:.3f}")


if __name__ == "__main__":
    main()
