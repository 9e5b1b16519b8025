"""Small defects on large images, with tiles and without: the share that is found at one alarm rate.

    python tests/benchmarks/evaluate_large_images.py --data MAGNETIC_TILE --output large

Images of 4000 x 3000 pixels are made of real ones: magnetic tiles at their own size, or any folder of good images, made
grey, laid side by side with seams blended. Good ones train and calibrate, others are held out, and on copies of these
one defect of 12 pixels is pasted: small real defects, as much darker or brighter than their surroundings as they are.
Printed is the share of either that raises an alarm at the stated rate, with tiles and without, and the share of defects
above as many good images as the rate allows. Of a copy only the tiles that see its defect are looked at again.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from scipy import ndimage

from diffad import AnomalyDenoisePipeline
from diffad.data import load_anomaly_dataset
from diffad.data.masks import mask_to_array
from diffad.images import image_to_rgb
from diffad.pipelines.large_images import Calibrations, LargeImage, blended_map, grid_of, join_large, whole_map
from diffad.training import fit

SEAM = 16  # pixels over which neighbours are blended
SHADING = 32.0  # sigma in pixels, above which brightness is blended over all the mosaic
CUT_OFF = 256  # pixels, at most, from the top and the left
DEFECT = 12  # pixels, the longer side
LARGEST = 24  # pixels, of the longer side of a real defect that is made so small
MARGIN = 4  # pixels around it


def ramp(length: int) -> np.ndarray:
    """(length,) weights that rise over the seam, and fall over another."""
    distance = np.minimum(np.arange(length), np.arange(length)[::-1]) + 1.0
    return np.minimum(distance / SEAM, 1.0).astype(np.float32)


def mosaic(images: list[np.ndarray], height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """(height, width) uint8 of images at their own size, drawn at random, flipped, laid in rows.

    Blended in two bands (Burt and Adelson, "A multiresolution spline with application to image mosaics", 1983): detail
    over the seams, shading over the whole, as if one lamp had lit all. Else steps of brightness outshine any defect.
    Cut out of a larger one, so that no place of a mosaic shows the same as that of another.
    """
    first_row, first_column = (int(one) for one in rng.integers(CUT_OFF, size=2))
    height, width = height + first_row, width + first_column
    detail, shading, weights = (np.full((height, width), value, np.float32) for value in (0.0, 0.0, 1e-6))
    top = 0
    while top < height:
        chosen, left = [], 0
        while left < width:
            image = images[rng.integers(len(images))][:: rng.choice([-1, 1]), :: rng.choice([-1, 1])]
            chosen.append((left, image))
            left += image.shape[1] - SEAM
        row_height = min(len(image) for _, image in chosen)  # a row is as high as its lowest image
        for left, image in chosen:
            image = image[:row_height]
            window = ramp(row_height)[:, None] * ramp(image.shape[1])
            part = slice(top, top + row_height), slice(left, left + image.shape[1])
            rows, columns = weights[part].shape
            low = smooth(image, SHADING)
            for total, values in ((detail, image - low), (shading, low), (weights, 1.0)):
                total[part] += (values * window)[:rows, :columns]
        top += row_height - SEAM
    whole = detail / weights + smooth(shading / weights, 2.0 * SHADING)
    return whole[first_row:, first_column:].round().clip(0, 255).astype(np.uint8)


def smooth(image: np.ndarray, sigma: float) -> np.ndarray:
    """(H, W) float32, by a Gaussian, of an eighth of the pixels a side: nothing finer is left."""
    small = Image.fromarray(image.astype(np.float32)).resize([-(-n // 8) for n in image.shape[::-1]], Image.BOX)
    smoothed = ndimage.gaussian_filter(np.asarray(small), sigma / 8.0, mode="nearest")
    return np.asarray(Image.fromarray(smoothed).resize(image.shape[::-1], Image.BILINEAR))


class Defect(NamedTuple):
    """A real defect and a margin around it, at the size at which it is pasted.

    change: (h, w) float32, how much brighter it is than its surroundings.
    mask: (h, w) float32 in [0, 1], how much of a pixel is the defect.
    """

    change: np.ndarray
    mask: np.ndarray


def defects_of(data: str, side: int) -> list[Defect]:
    """Real defects of up to `LARGEST` pixels, their longer side made `side`."""
    found = []
    for row in load_anomaly_dataset(data, "test"):
        if not row["label"] or row["mask"] is None:
            continue
        image, masks = np.asarray(image_to_rgb(row["image"]).convert("L"), np.float32), mask_to_array(row["mask"])
        labels, _ = ndimage.label(masks, np.ones((3, 3)))
        for number, box in enumerate(ndimage.find_objects(labels), start=1):
            longer = max(one.stop - one.start for one in box)
            if not side / 2 <= longer <= LARGEST:
                continue
            around = tuple(
                slice(max(0, one.start - 2 * MARGIN), min(n, one.stop + 2 * MARGIN))
                for one, n in zip(box, image.shape, strict=True)
            )
            mask = labels[around] == number
            surroundings = image[around][~ndimage.binary_dilation(masks[around], iterations=2)]
            if not len(surroundings):
                continue
            size = [max(1, round(n * side / longer)) for n in mask.shape[::-1]]
            change, soft = (
                np.asarray(Image.fromarray(values.astype(np.float32)).resize(size, Image.BILINEAR))
                for values in (image[around] - surroundings.mean(), ndimage.gaussian_filter(mask * 1.0, 1.0))
            )
            found.append(Defect(change, np.minimum(2.0 * soft, 1.0)))
    return found


def paste(image: np.ndarray, defect: Defect, rng: np.random.Generator) -> tuple[np.ndarray, tuple[slice, slice]]:
    """A copy with a defect somewhere, as much darker or brighter than its new surroundings, and where."""
    sides = defect.mask.shape
    place = tuple(
        slice(first := int(rng.integers(SEAM, n - side - SEAM)), first + side)
        for n, side in zip(image.shape, sides, strict=True)
    )
    changed = image.copy()
    blended = image[place] * (1.0 - defect.mask) + (image[place].mean() + defect.change) * defect.mask
    changed[place] = blended.round().clip(0, 255)
    return changed, place


def write_mosaic(
    folder: Path, name: str, number: int, good: list[np.ndarray], defects: list[Defect], args: argparse.Namespace
) -> tuple[slice, slice] | None:
    """One good mosaic into a folder; of one held out also a copy with a defect, whose place is returned."""
    rng = np.random.default_rng([args.seed, name == "train", number])
    image = mosaic(good, args.height, args.width, rng)
    Image.fromarray(image).save(folder / name / f"{number:03}.png", compress_level=1)
    if name == "train":
        return None
    bad, place = paste(image, defects[rng.integers(len(defects))], rng)
    Image.fromarray(bad).save(folder / "bad" / f"{number:03}.png", compress_level=1)
    return place


def write_images(args: argparse.Namespace, folder: Path) -> dict[str, tuple[slice, slice]]:
    """Mosaics into folders, of one half of the images or, held out, of the other; where each bad one's defect is."""
    rows = load_anomaly_dataset(args.data, "train")
    good = [np.asarray(image_to_rgb(row["image"]).convert("L")) for row in rows if not row["label"]]
    defects = defects_of(args.data, args.defect)
    print(f"{len(defects)} real defects to paste, {args.defect} px", flush=True)
    for name in ("train", "good", "bad"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    workers = min(args.num_train + args.num_held_out, os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("forkserver")) as pool:
        of_training = [
            pool.submit(write_mosaic, folder, "train", i, good[::2], defects, args) for i in range(args.num_train)
        ]
        held_out = [
            pool.submit(write_mosaic, folder, "good", i, good[1::2], defects, args) for i in range(args.num_held_out)
        ]
        for one in of_training:
            one.result()
        return {f"{i:03}.png": one.result() for i, one in enumerate(held_out)}


def scores_of(
    pipeline: AnomalyDenoisePipeline, paths: list[Path], place: tuple[slice, slice], batch_size: int
) -> tuple[float, float]:
    """Of a good image and of its copy with a defect at a place, as a call of each gives them."""
    images = [np.asarray(Image.open(path)) for path in paths]
    if pipeline.tile_size is None:
        return tuple(float(pipeline(image, match_input_resolution=False).anomaly_score[0]) for image in images)
    calibrations = Calibrations(pipeline.calibration, pipeline.tile_calibration)
    good, bad = (LargeImage(Image.fromarray(one), 0, None, batch_size, None, None) for one in images)
    grid = grid_of(pipeline, images[0].shape)
    first, last = (
        [f(one.start, one.stop - 1) // n for one, n in zip(place, grid.cell, strict=True)] for f in (min, max)
    )
    touched = [
        (row, column)
        for row, column in grid.places
        if row <= last[0] and row + grid.tile[0] > first[0] and column <= last[1] and column + grid.tile[1] > first[1]
    ]
    with torch.no_grad():
        of_good = blended_map(pipeline, good, calibrations.of_tiles)
        own, changed = (blended_map(pipeline, one, calibrations.of_tiles, places=touched) for one in (good, bad))
        maps = [
            join_large(of_tiles, whole_map(pipeline, one, calibrations.of_image), 0, calibrations)
            for one, of_tiles in ((good, of_good), (bad, of_good - own + changed))
        ]
    return tuple(float(pipeline.image_scores(one[None])[0]) for one in maps)


def measure(
    folder: Path, places: dict[str, tuple[slice, slice]], tile_size: str, args: argparse.Namespace
) -> dict[str, Any]:
    """The share of images with and without a defect that raise an alarm, and the area under the curve."""
    model = folder / f"model-{tile_size}"
    started = time.time()
    flags = ["--train_data_dir", folder / "train", "--output_dir", model, "--tile_size", tile_size]
    flags += ["--false_alarm_rate", args.false_alarm_rate, "--calibration_fraction", args.calibration_fraction]
    flags += ["--batch_size", args.batch_size, "--num_example_images", 0]
    fit.main([str(flag) for flag in flags])
    fitted = time.time()
    pipeline = AnomalyDenoisePipeline.from_pretrained(model).to(args.device)
    pipeline.set_progress_bar_config(disable=True)
    pairs = [
        scores_of(pipeline, [folder / name / file for name in ("good", "bad")], place, args.batch_size)
        for file, place in places.items()
    ]
    good, bad = np.array(pairs).T
    threshold = float(pipeline.calibration.image_threshold[0])
    allowed = np.sort(good)[int(np.ceil(len(good) * (1.0 - args.false_alarm_rate))) - 1]
    of_places = None if pipeline.tile_calibration is None else pipeline.tile_calibration.place_mean
    return {
        "places_have_their_own_statistics": of_places is not None and bool(of_places.std() > 0.0),
        "found_at_the_threshold": float((bad > threshold).mean()),
        "false_alarms_at_the_threshold": float((good > threshold).mean()),
        "found_at_the_rate": float((bad > allowed).mean()),
        "auroc": float((bad[:, None] > good).mean()),
        "seconds_to_fit": round(fitted - started, 1),
        "seconds_a_pair": round((time.time() - fitted) / len(good), 2),
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
    parser.add_argument("--defect", type=int, default=DEFECT, help=f"pixels, the longer side ({DEFECT})")
    parser.add_argument("--false_alarm_rate", type=float, default=0.02, help="(0.02)")
    parser.add_argument("--seed", type=int, default=0, help="(0)")
    parser.add_argument("--threads", type=int, default=1, help="of torch (1)")
    parser.add_argument("--device", default="cpu", help="that scores, cpu or cuda (cpu)")
    parser.add_argument("--batch_size", type=int, default=16, help="tiles in one pass (16)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    folder = Path(args.output)
    places = write_images(args, folder)
    size = str(min(224, args.width, args.height))
    figures = {
        name: measure(folder, places, tiles, args) for name, tiles in (("without tiles", "none"), ("with tiles", size))
    }
    (folder / "figures.json").write_text(json.dumps({"arguments": vars(args), **figures}, indent=2) + "\n")
    for name, one in figures.items():
        print(f"{name}: " + ", ".join(f"{key.replace('_', ' ')} {value:g}" for key, value in one.items()))


if __name__ == "__main__":
    main()
