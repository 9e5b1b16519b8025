"""Peak memory of scoring images of 12,000 x 9,000 pixels, above that of the idle process.

    python tests/benchmarks/benchmark_large_images.py
    python tests/benchmarks/benchmark_large_images.py --megapixels 1 4 12 48

The second is of images of so many megapixels and a model that looks at tiles, as `diffad fit` makes it of
EfficientNet-lite0's features at 224 pixels: memory above idle and images a minute.

JPEG, PNG and tiled TIFF, 8 and 16 bits, grey and colour; one image and five, through `pipe(paths)` with maps at the
network's size and through `predict_files`, which writes maps and masks at the image's own. Each case has a process of
its own, which has scored a small image before. On Linux, which tells a process's peak and lets it start anew.
"""

from __future__ import annotations

import argparse
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from diffad import AnomalyDenoisePipeline, TimmFeatureExtractor
from diffad.pipelines.feature_maps import FEATURE_WEIGHTS

sys.path.insert(0, str(Path(__file__).parents[1]))
from conftest import texture, textures, tiny_pipeline

WIDTH, HEIGHT, TILE = 12_000, 9_000, 256
CASES = [("JPEG", 8), ("PNG", 8), ("TIFF", 8), ("PNG", 16), ("TIFF", 16)]


def pixels(depth: int, colour: bool, width: int, height: int) -> np.ndarray:
    """(H, W) or (H, W, 3): a texture, repeated, under a gradient."""
    tile = np.tile(texture(0, 64), (height // 64 + 1, width // 64 + 1, 1))[:height, :width]
    tile = tile if colour else tile[..., 0]
    return tile if depth == 8 else tile.astype(np.uint16) * 200


def write_png_16(path: Path, values: np.ndarray) -> None:
    """Pillow writes no colours of 16 bits."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    height, width = values.shape[:2]
    rows = values.astype(">u2").reshape(height, -1).view(np.uint8)
    packed = zlib.compress(np.pad(rows, ((0, 0), (1, 0))).tobytes(), 1)
    head = struct.pack(">IIBBBBB", width, height, 16, 2 if values.ndim == 3 else 0, 0, 0, 0)
    with open(path, "wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", packed) + chunk(b"IEND", b""))


def write_tiled_tiff(path: Path, values: np.ndarray) -> None:
    """Uncompressed tiles of 256 x 256 pixels; Pillow writes strips only."""
    height, width = values.shape[:2]
    samples, bits = (values.shape[2] if values.ndim == 3 else 1), 8 * values.itemsize
    down, across = -(-height // TILE), -(-width // TILE)
    size = TILE * TILE * samples * values.itemsize
    count = down * across
    tables = 8 + size * count
    entries = [
        (256, 4, 1, width),
        (257, 4, 1, height),
        (258, 3, samples, bits if samples == 1 else tables),
        (259, 3, 1, 1),
        (262, 3, 1, 2 if samples == 3 else 1),
        (277, 3, 1, samples),
        (284, 3, 1, 1),
        (322, 4, 1, TILE),
        (323, 4, 1, TILE),
        (324, 4, count, tables + 8),
        (325, 4, count, tables + 8 + 4 * count),
    ]
    with open(path, "wb") as file:
        directory = tables + 8 + 8 * count
        file.write(b"II*\0" + struct.pack("<I", directory))
        for row in range(down):
            band = values[row * TILE : (row + 1) * TILE]
            margin = [(0, TILE - len(band)), (0, across * TILE - width)] + [(0, 0)] * (values.ndim - 2)
            band = np.pad(band, margin)
            for column in range(across):
                file.write(np.ascontiguousarray(band[:, column * TILE : (column + 1) * TILE]).tobytes())
        file.write(struct.pack("<4H", *[bits] * 4))
        file.write(struct.pack(f"<{count}I", *(8 + size * i for i in range(count))))
        file.write(struct.pack(f"<{count}I", *[size] * count))
        file.write(struct.pack("<H", len(entries)))
        for entry in entries:
            file.write(struct.pack("<HHII", *entry))
        file.write(bytes(4))


def write_case(folder: Path, kind: str, depth: int, colour: bool, width: int, height: int, count: int) -> list[Path]:
    values = pixels(depth, colour, width, height)
    first = folder / f"0.{kind.lower()}"
    if kind == "TIFF":
        write_tiled_tiff(first, values)
    elif depth == 16:
        write_png_16(first, values)
    else:
        Image.fromarray(values).save(first, **({"compress_level": 1} if kind == "PNG" else {"quality": 90}))
    return [first, *(Path(shutil.copy(first, folder / f"{i}.{kind.lower()}")) for i in range(1, count))]


def status(name: str) -> float:
    """In MB, of this process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024 / 1e6


def of_tiles() -> AnomalyDenoisePipeline:
    """What `diffad fit` makes of large images, calibrated on a few."""
    pipeline = AnomalyDenoisePipeline(
        None,
        None,
        TimmFeatureExtractor.from_backbone(image_size=224),
        position_trust=0.0,
        weights=FEATURE_WEIGHTS,
        tile_size=224,
    )
    return pipeline.calibrate(textures(8, 448), false_alarm_rate=0.5)


def small() -> AnomalyDenoisePipeline:
    return tiny_pipeline(sample_size=32).calibrate(textures(12, 32), false_alarm_rate=0.25)


def measure(way: str, paths: list[str], output: str) -> None:
    """Prints the peak above idle in MB, and seconds an image."""
    from diffad.predict import predict_files

    pipeline = of_tiles() if way.endswith("tiles") else small()
    pipeline.set_progress_bar_config(disable=True)
    pipeline.register_to_config(value_range=65535.0)
    pipeline(texture(0, 64))
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    idle, started = status("VmRSS"), time.perf_counter()
    if way.startswith("pipe"):
        pipeline(paths, match_input_resolution=False)
    else:
        counts = predict_files(pipeline, [Path(path) for path in paths], output)
        if counts["unreadable"]:
            raise RuntimeError(f"{counts['unreadable']} of {len(paths)} images could not be read")
    print(f"{status('VmHWM') - idle:.0f} {(time.perf_counter() - started) / len(paths):.2f}")


def run_alone(way: str, output: str, paths: list[Path], threads: int) -> tuple[float, float]:
    """`measure` in a process of its own."""
    command = [sys.executable, __file__, "--threads", str(threads), "--measure", way, output, *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    memory, seconds = done.stdout.split()[-2:]
    return float(memory), float(seconds)


def measure_tiles(args: argparse.Namespace) -> None:
    print("| megapixels | file | pipe: MB above idle | images a minute | predict: MB above idle | images a minute |")
    print("|---|---|---|---|---|---|")
    for megapixels in args.megapixels:
        height = round((0.75e6 * megapixels) ** 0.5)
        for kind in args.files:
            with tempfile.TemporaryDirectory(dir=args.folder) as name:
                paths = write_case(Path(name), kind, 8, True, round(height / 0.75), height, 1)
                cells = []
                for way in ("pipe-tiles", "predict-tiles"):
                    memory, seconds = run_alone(way, f"{name}/out", paths, args.threads)
                    cells += [f"{memory:.0f}", f"{60.0 / seconds:.1f}"]
            print(f"| {megapixels:g} | {kind} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=WIDTH, help="(12000)")
    parser.add_argument("--height", type=int, default=HEIGHT, help="(9000)")
    parser.add_argument("--folder", help="for the images, 4 GB of them at a time (a temporary one)")
    parser.add_argument("--measure", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--megapixels", type=float, nargs="+", help="images of a model that looks at tiles")
    parser.add_argument("--files", nargs="+", choices=["JPEG", "PNG"], default=["JPEG", "PNG"], help="of those")
    parser.add_argument("--threads", type=int, default=1, help="of torch (1)")
    args = parser.parse_args()
    if args.megapixels:
        measure_tiles(args)
        return
    if args.measure:
        torch.set_num_threads(args.threads)
        measure(args.measure[0], args.measure[2:], args.measure[1])
        return
    print("| file | images | pipe: MB above idle | s an image | predict: MB above idle | s an image |")
    print("|---|---|---|---|---|---|")
    for kind, depth in CASES:
        for colour in (False, True):
            with tempfile.TemporaryDirectory(dir=args.folder) as name:
                paths = write_case(Path(name), kind, depth, colour, args.width, args.height, 5)
                for count in (1, 5):
                    cells = []
                    for way in ("pipe", "predict"):
                        memory, seconds = run_alone(way, f"{name}/out-{count}", paths[:count], args.threads)
                        cells += [f"{memory:.0f}", f"{seconds:.2f}"]
                    kinds = f"{kind}, {depth} bits, {'colour' if colour else 'grey'}"
                    print(f"| {kinds} | {count} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
