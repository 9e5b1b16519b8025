"""Small defects on large images, with tiles and without: the share that is found at one alarm rate.

    python tests/benchmarks/evaluate_large_images.py --data MAGNETIC_TILE --output large

Images of 4000 x 3000 pixels are made of real ones: magnetic tiles at their own size, or any folder of good images, laid
side by side with seams blended. Good ones train and calibrate, others are held out, and on copies of these a defect of
12 x 12 pixels is pasted, cut from real defective images. Printed is the share of either that raises an alarm at the
stated rate, with tiles and without, and the share of defects above as many good images as the rate allows.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scipy import ndimage

from diffad import AnomalyDenoisePipeline
from diffad.data import load_anomaly_dataset
from diffad.data.masks import mask_to_array
from diffad.images import image_to_rgb
from diffad.training import fit

SEAM = 16  # pixels over which neighbours are blended
DEFECT = 12


def ramp(length: int) -> np.ndarray:
    """(length,) weights that rise over the seam, and fall over another."""
    distance = np.minimum(np.arange(length), np.arange(length)[::-1]) + 1.0
    return np.minimum(distance / SEAM, 1.0).astype(np.float32)


def mosaic(images: list[np.ndarray], height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """(height, width, 3) uint8 of images at their own size, drawn at random, flipped, laid in rows."""
    total, weights = np.zeros((height, width, 3), np.float32), np.full((height, width, 1), 1e-6, np.float32)
    top = 0
    while top < height:
        left, row_height = 0, height
        while left < width:
            image = images[rng.integers(len(images))]
            image = image[:: rng.choice([-1, 1]), :: rng.choice([-1, 1])]
            window = ramp(image.shape[0])[:, None, None] * ramp(image.shape[1])[:, None]
            part = slice(top, top + image.shape[0]), slice(left, left + image.shape[1])
            shape = total[part].shape[:2]
            total[part] += (image * window)[: shape[0], : shape[1]]
            weights[part] += window[: shape[0], : shape[1]]
            left += max(1, image.shape[1] - SEAM)
            row_height = min(row_height, image.shape[0])
        top += max(1, row_height - SEAM)
    return (total / weights).round().clip(0, 255).astype(np.uint8)


def defects_of(data: str, side: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Squares (side, side, 3) around real defects' centres, and where in them the defect is (side, side), in [0, 1]."""
    found = []
    for row in load_anomaly_dataset(data, "test"):
        if not row["label"] or row["mask"] is None:
            continue
        image, mask = np.asarray(image_to_rgb(row["image"])), mask_to_array(row["mask"])
        inside = ndimage.distance_transform_edt(mask)
        y, x = np.unravel_index(inside.argmax(), mask.shape)
        top, left = (int(np.clip(c - side // 2, 0, n - side)) for c, n in zip((y, x), mask.shape, strict=True))
        square = slice(top, top + side), slice(left, left + side)
        if mask[square].mean() > 0.2:
            found.append((image[square], ndimage.gaussian_filter(mask[square].astype(np.float32), 1.0)))
    return found


def paste(image: np.ndarray, defect: tuple[np.ndarray, np.ndarray], rng: np.random.Generator) -> np.ndarray:
    """A copy with a defect somewhere, as much darker or brighter than its place as it was than its own surroundings."""
    square, mask = defect
    side = len(square)
    top, left = (int(rng.integers(SEAM, n - side - SEAM)) for n in image.shape[:2])
    changed = image.copy()
    place = changed[top : top + side, left : left + side].astype(np.float32)
    ground = square[mask < 0.5] if (mask < 0.5).any() else square.reshape(-1, 3)
    moved = square.astype(np.float32) - ground.mean(axis=0) + place.mean(axis=(0, 1))
    blended = place + mask[..., None] * (moved - place)
    changed[top : top + side, left : left + side] = blended.round().clip(0, 255)
    return changed


def made_images(args: argparse.Namespace, name: str) -> Iterator[tuple[str, np.ndarray]]:
    """Good mosaics for training, of one half of the images, or held out, of the other."""
    rows = load_anomaly_dataset(args.data, "train")
    good = [np.asarray(image_to_rgb(row["image"])) for row in rows if not row["label"]]
    good = good[::2] if name == "train" else good[1::2]
    rng = np.random.default_rng([args.seed, name == "train"])
    for i in range(args.num_train if name == "train" else args.num_held_out):
        yield f"{i:03}.png", mosaic(good, args.height, args.width, rng)


def write_images(args: argparse.Namespace, folder: Path) -> None:
    rng, defects = np.random.default_rng(args.seed + 1), defects_of(args.data, args.defect)
    print(f"{len(defects)} real defects to paste, {args.defect} x {args.defect} px", flush=True)
    for name in ("train", "good"):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for file, image in made_images(args, name):
            Image.fromarray(image).save(folder / name / file, compress_level=1)
            if name == "good":
                (folder / "bad").mkdir(exist_ok=True)
                bad = paste(image, defects[rng.integers(len(defects))], rng)
                Image.fromarray(bad).save(folder / "bad" / file, compress_level=1)


def measure(folder: Path, tile_size: str, args: argparse.Namespace) -> dict[str, float]:
    """The share of images with and without a defect that raise an alarm, and the area under the curve."""
    model = folder / f"model-{tile_size}"
    started = time.time()
    flags = ["--train_data_dir", folder / "train", "--output_dir", model, "--tile_size", tile_size]
    flags += ["--false_alarm_rate", args.false_alarm_rate, "--calibration_fraction", args.calibration_fraction]
    fit.main([str(flag) for flag in (*flags, "--num_example_images", 0)])
    fitted = time.time()
    pipeline = AnomalyDenoisePipeline.from_pretrained(model)
    pipeline.set_progress_bar_config(disable=True)
    scores, alarms = {}, {}
    for name in ("good", "bad"):
        outputs = [pipeline(path, match_input_resolution=False) for path in sorted((folder / name).iterdir())]
        scores[name] = np.array([output.anomaly_score[0] for output in outputs])
        alarms[name] = float(np.mean([output.is_anomalous[0] for output in outputs]))
    count = 2 * len(scores["good"])
    allowed = np.sort(scores["good"])[int(np.ceil(len(scores["good"]) * (1.0 - args.false_alarm_rate))) - 1]
    return {
        "found_at_the_threshold": alarms["bad"],
        "false_alarms_at_the_threshold": alarms["good"],
        "found_at_the_rate": float((scores["bad"] > allowed).mean()),
        "auroc": float((scores["bad"][:, None] > scores["good"]).mean()),
        "seconds_to_fit": round(fitted - started, 1),
        "seconds_an_image": round((time.time() - fitted) / count, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="good images, and defective ones with masks")
    parser.add_argument("--output", required=True, metavar="DIR", help="gets images, models and figures.json")
    parser.add_argument("--width", type=int, default=4000, help="(4000)")
    parser.add_argument("--height", type=int, default=3000, help="(3000)")
    parser.add_argument("--num_train", type=int, default=160, help="mosaics to train and calibrate on (160)")
    parser.add_argument(
        "--num_held_out", type=int, default=100, help="good ones held out, and as many with defects (100)"
    )
    parser.add_argument("--calibration_fraction", type=float, default=0.6, help="of the former, for thresholds (0.6)")
    parser.add_argument("--defect", type=int, default=DEFECT, help=f"pixels a side ({DEFECT})")
    parser.add_argument("--false_alarm_rate", type=float, default=0.02, help="(0.02)")
    parser.add_argument("--seed", type=int, default=0, help="(0)")
    parser.add_argument("--threads", type=int, default=1, help="of torch (1)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    folder = Path(args.output)
    write_images(args, folder)
    size = str(min(224, args.width, args.height))
    figures = {name: measure(folder, tiles, args) for name, tiles in (("without tiles", "none"), ("with tiles", size))}
    (folder / "figures.json").write_text(json.dumps({"arguments": vars(args), **figures}, indent=2) + "\n")
    for name, one in figures.items():
        print(f"{name}: " + ", ".join(f"{key.replace('_', ' ')} {value:g}" for key, value in one.items()))


if __name__ == "__main__":
    main()
