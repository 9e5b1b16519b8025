#!/usr/bin/env python
"""`diffad fit` or `diffad train` on several data sets and seeds, evaluated beside PaDiM: one table.

    python tests/benchmarks/evaluate_data_sets.py DATA... --output runs/data_sets [--command fit] [--seeds 0 1 2]

Each run is the shipped command with data and output alone, in a process of its own, then `training/evaluate.py`. What
is done stays in the output folder, `COMMAND-DATA-seed-N/report.json`, so the same command goes on where it was stopped.
The table, `table.json`, holds means and deviations over the seeds, and a 95% interval of the mean image AUROC: 2,000
bootstrap samples of the test images, good and defective ones apart, the same for all seeds.

`--against` takes the reports of another detector on the same data set and splits, one a seed, as `training/evaluate.py`
or `evaluate_anomalib.py` writes them, and adds how much higher ours is: the interval is paired, as both see each sample
of images. With `--against_maps`, the folders that `--save_maps` of either wrote, pixel AP is compared likewise.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from diffad.data import load_anomaly_dataset
from diffad.data.masks import resize_image_and_mask
from diffad.evaluation.detectors import name_maps
from diffad.evaluation.metric_names import METRIC_TITLES
from diffad.files import write_text_whole

NUM_SAMPLES = 2000
NUM_PIXEL_SAMPLES, NUM_BINS = 500, 2000  # of pixel AP, which takes a pass over the bins for each


def evaluate(
    data: str, command: str, seed: int, folder: Path, minutes: float, with_padim: bool, with_maps: bool
) -> dict[str, Any]:
    """The report of one run, made unless it is there. PaDiM draws nothing, so one seed's is enough."""
    report, model, timed = folder / "report.json", folder / "model", folder / "seconds.json"
    if report.exists():
        known = json.loads(report.read_text(encoding="utf-8"))
        if (known["baselines"] or not with_padim) and (known.get("has_maps") or not with_maps):
            return known
    if not timed.exists():
        flags = ["--minutes", str(minutes)] if command == "train" else []
        started = time.time()
        run("diffad.cli", *command.split(), data, "--output", str(model), "--seed", str(seed), *flags)
        write_text_whole(timed, f"{time.time() - started:.1f}\n")
    found = folder / "found.json"
    run(
        *("diffad.training.evaluate", "--model", str(model), "--data", data, "--output", str(found)),
        *("--baselines", "padim" if with_padim else "none"),
        *(("--save_maps", str(folder / "maps")) if with_maps else ()),
    )
    result = json.loads(found.read_text(encoding="utf-8"))
    result |= {"seconds": float(timed.read_text(encoding="utf-8")), "has_maps": with_maps}
    write_text_whole(report, json.dumps(result, indent=1) + "\n")
    return result


def run(module: str, *arguments: str) -> None:
    subprocess.run([sys.executable, "-m", module, *arguments], check=True)


def shares_above(reports: Sequence[dict[str, Any]], category: str) -> np.ndarray:
    """(defective, good): of each two images, the share of seeds whose scores tell them apart; the AUROC is the mean."""
    of_seeds = [sorted(scores_of(report, category), key=lambda row: row["path"]) for report in reports]
    labels = np.asarray([row["label"] for row in of_seeds[0]])
    scores = np.asarray([[row["score"] for row in rows] for rows in of_seeds])  # (seeds, N)
    good, bad = scores[:, labels == 0], scores[:, labels == 1]
    above = (bad[:, :, None] > good[:, None]) + 0.5 * (bad[:, :, None] == good[:, None])
    return above.mean(axis=0)


def scores_of(report: dict[str, Any], category: str) -> list[dict[str, Any]]:
    """Path, label and score of each test image, of `training/evaluate.py`'s report or of one model of anomalib's."""
    if "scores" in report:
        return report["scores"][category]
    (of_model,) = report["results"].values()
    return of_model[category]["scores"]


def interval(above: np.ndarray) -> tuple[float, float]:
    """In which 95% of bootstrap samples of the images have the mean of (defective, good) pairs."""
    generator = np.random.default_rng(0)
    values = [
        above[np.ix_(*(generator.integers(count, size=count) for count in above.shape))].mean()
        for _ in range(NUM_SAMPLES)
    ]
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def difference(reports: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]], category: str) -> dict[str, Any]:
    """How much higher the reports' image AUROC is than the others', means over the seeds of either."""
    ours, theirs = shares_above(reports, category), shares_above(others, category)
    if ours.shape != theirs.shape:
        raise ValueError(
            f"--against: {theirs.shape} defective and good images of {category}, and ours are {ours.shape}."
        )
    return {
        "seeds": len(others),
        "image_auroc": float(theirs.mean()),
        "image_auroc_difference": float((ours - theirs).mean()),
        "image_auroc_difference_interval": interval(ours - theirs),
    }


class PixelCounts(NamedTuple):
    """How often each bin of a seed's map values comes up in each image, (N, bins) int64, the highest values first."""

    defective: np.ndarray
    good: np.ndarray


def pixel_counts(folder: Path, names: Sequence[str], masks: Sequence[np.ndarray]) -> PixelCounts:
    """Of maps below a folder and masks (R, R) bool.

    Raises:
        ValueError: a map is of another size than the masks.
    """
    maps = [np.asarray(Image.open(folder / name)) for name in names]
    if other := {one.shape for one in maps} - {masks[0].shape}:
        raise ValueError(f"{folder}: maps of {other.pop()}, and masks of {masks[0].shape}. Give both one --resolution.")
    every = np.concatenate([one.ravel() for one in maps])
    shares = np.geomspace(1.0 / every.size, 1.0, NUM_BINS)  # fine where the highest values are
    edges = np.unique(np.quantile(every, 1.0 - shares, method="lower"))  # a bin begins at a value that comes up
    edges = np.r_[-np.inf, edges[1:], np.nextafter(every.max(), np.inf)]
    counts = [
        [np.histogram(one[chosen], edges)[0][::-1] for chosen in (mask, ~mask)]
        for one, mask in zip(maps, masks, strict=True)
    ]
    defective, good = np.asarray(counts).swapaxes(0, 1)
    return PixelCounts(defective, good)


def average_precision(counts: PixelCounts, times: np.ndarray) -> float:
    """Of the pixels of images that come up so many times each, (N,)."""
    found, false = (np.cumsum(times @ one) for one in counts)
    if not found[-1]:
        return float("nan")
    precision = found / np.maximum(found + false, 1)
    return float((np.diff(found, prepend=0) * precision).sum() / found[-1])


def pixel_difference(
    ours: Sequence[Path], theirs: Sequence[Path], data: str, category: str, resolution: int
) -> dict[str, Any]:
    """How much higher the pixel AP of our maps is than that of theirs, means over the seeds of either.

    Of the images that have a mask or are good; nothing where no defective one has.
    """
    images = load_anomaly_dataset(data, "test", [category])
    every = name_maps(images["path"], images["defect"], category)
    names, masks, labels, side = [], [], [], (resolution, resolution)
    for name, row in zip(every, images, strict=True):
        if row["mask"] is not None or not row["label"]:
            blank = row["mask"] is None
            masks.append(np.zeros(side, bool) if blank else resize_image_and_mask(row["image"], row["mask"], side)[1])
            names.append(name)
            labels.append(row["label"])
    if not any(mask.any() for mask in masks):
        return {}
    of_ours, of_theirs = ([pixel_counts(one, names, masks) for one in detector] for detector in (ours, theirs))

    def mean(seeds: Sequence[PixelCounts], times: np.ndarray) -> float:
        return float(np.mean([average_precision(one, times) for one in seeds]))

    of_label, generator = np.asarray(labels), np.random.default_rng(0)
    values = []
    for _ in range(NUM_PIXEL_SAMPLES):
        drawn = [generator.choice(np.flatnonzero(of_label == one), (of_label == one).sum()) for one in (0, 1)]
        times = np.bincount(np.concatenate(drawn), minlength=len(labels))
        values.append(mean(of_ours, times) - mean(of_theirs, times))
    once = np.ones(len(labels), int)
    low, high = np.nanquantile(values, [0.025, 0.975])  # a sample may have no defective pixel
    return {
        "pixel_ap": mean(of_theirs, once),
        "pixel_ap_difference": mean(of_ours, once) - mean(of_theirs, once),
        "pixel_ap_difference_interval": (float(low), float(high)),
    }


def summarise(reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means and deviations over the seeds of each category's metrics, and PaDiM's."""
    table = {}
    for category in reports[0]["scores"]:
        results = [report["results"][category] for report in reports]
        row: dict[str, Any] = {
            name: [float(np.mean(values)), float(np.std(values))]
            for name in METRIC_TITLES
            if all(isinstance(result.get(name), float) for result in results)
            if (values := [result[name] for result in results])
        }
        row["image_auroc_interval"] = interval(shares_above(reports, category))
        row["seconds"] = [report["seconds"] for report in reports]
        row["padim"] = reports[0]["baselines"].get("padim", {}).get(category)
        table[category] = row
    return table


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("data", nargs="+", help="data sets, as `diffad fit` takes them")
    parser.add_argument("--output", type=Path, required=True, help="gets the models, reports and table.json")
    parser.add_argument("--command", choices=["fit", "fit --multi-scale", "train"], default="fit")
    parser.add_argument("--minutes", type=float, default=20.0, help="of each training (20)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--against", type=Path, nargs="+", metavar="REPORT", help="of another detector, one a seed")
    parser.add_argument("--against_maps", type=Path, nargs="+", metavar="DIR", help="of its maps, one a seed")
    args = parser.parse_args(argv)
    if args.against_maps and len(args.against_maps) != len(args.against or []):
        parser.error("--against_maps: give a folder of maps for each report of --against")
    table = {}
    for data in args.data:
        name = re.sub(r"[^\w.]+", "-", f"{args.command} {data}").strip("-")
        name += f"-{args.minutes:g}-minutes" if args.command == "train" else ""
        folders = [args.output / f"{name}-seed-{seed}" for seed in args.seeds]
        reports = []
        for seed, folder in zip(args.seeds, folders, strict=True):
            folder.mkdir(parents=True, exist_ok=True)
            reports.append(
                evaluate(data, args.command, seed, folder, args.minutes, not reports, bool(args.against_maps))
            )
        table[data] = summarise(reports)
        if args.against:
            others = [json.loads(path.read_text(encoding="utf-8")) for path in args.against]
            for category, row in table[data].items():
                row["against"] = difference(reports, others, category)
                if args.against_maps:
                    ours, resolution = [folder / "maps" for folder in folders], reports[0]["resolution"]
                    row["against"] |= pixel_difference(ours, args.against_maps, data, category, resolution)
        record = {"command": args.command, "seeds": args.seeds, "machine": reports[0]["machine"], "results": table}
        write_text_whole(args.output / "table.json", json.dumps(record, indent=1) + "\n")
        for category, row in table[data].items():
            shown = ", ".join(f"{METRIC_TITLES[n]} {100 * row[n][0]:.1f}" for n in METRIC_TITLES if n in row)
            if args.against:
                for metric in ("image_auroc", "pixel_ap"):
                    if metric in row["against"]:
                        low, high = (100 * bound for bound in row["against"][f"{metric}_difference_interval"])
                        mean = 100 * row["against"][f"{metric}_difference"]
                        shown += f"; {METRIC_TITLES[metric]} above the other's by {mean:.1f} ({low:.1f} to {high:.1f})"
            print(f"{data} {category}: {shown}", flush=True)


if __name__ == "__main__":
    main()
