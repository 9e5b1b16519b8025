"""How well the choice by synthetic defects ranks settings against a test split's real ones.

    python tests/benchmarks/evaluate_choice.py runs/parts --data DATA

takes a model that `diffad train` made. Every weighting of the four maps is scored against defects drawn on the good
images that the training held out for its choice, and against the test split; both are ranked. Spearman's rank
correlation says how far they agree, and the table what the choice gave away. Of a model that `diffad fit` made, the
weightings are of the features' two maps. `--contrast 0 0.1 0.2` compares contrasts instead, with the model's weights.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from scipy.stats import spearmanr

from diffad import AnomalyDenoisePipeline
from diffad.data import load_anomaly_dataset
from diffad.data.masks import resize_image_and_mask
from diffad.images import ImageSequence
from diffad.pipelines.checks import MAP_NAMES
from diffad.pipelines.feature_maps import FEATURE_WEIGHTS
from diffad.training.choice import (
    DEFECT_RESOLUTION,
    WEIGHT_STEPS,
    CategoryMaps,
    measure_defects,
    measure_maps,
    rate_setting,
    simplex,
    take_statistics,
    with_settings,
)
from diffad.training.data import hold_out, read_good_images

METRICS = ("image_auroc", "pixel_ap", "pixel_pro")


def measure_test(pipeline: AnomalyDenoisePipeline, data: str, seed: int) -> CategoryMaps:
    """The test split's maps; no masks unless every defective image has one."""
    test = load_anomaly_dataset(data, "test")
    side = (DEFECT_RESOLUTION,) * 2
    rows = ImageSequence.of_rows(test["image"], range(len(test)), pipeline.value_range).resized(side)
    images = [row[0].clamp(0.0, 1.0) for row in rows]
    is_good = np.asarray(test["label"]) == 0
    masks = []
    for good, row in zip(is_good, test, strict=True):
        if good or row["mask"] is not None:
            masks.append(resize_image_and_mask(row["image"], row["mask"], side)[1])
    of_all = np.stack(masks) if len(masks) == len(test) else None
    kind = np.where(is_good, "", "real")
    return measure_maps(pipeline, images, of_all, is_good, np.arange(len(test)), kind, 0, seed)


def compare_contrasts(
    pipeline: AnomalyDenoisePipeline,
    contrasts: Sequence[float],
    weights: Sequence[float],
    drawn: Sequence[CategoryMaps],
    real: Sequence[CategoryMaps] | None,
) -> None:
    """Prints what each contrast reaches against drawn defects, and against the test split's."""
    for contrast in contrasts:
        pipeline.register_to_config(contrast=contrast)
        rated = [rate_setting(pipeline, drawn, weights, 1.0, 1.0)]
        if real:
            rated.append(rate_setting(pipeline, real, weights, 1.0, 1.0, references=drawn))
        figures = [" / ".join(f"{100 * one[name]:.1f}" for name in METRICS) for one in rated]
        print(f"{contrast:4g}  objective {100 * rated[0]['objective']:.1f}  {'  real: '.join(figures)}", flush=True)


def main() -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", help="folder that `diffad train` or `diffad fit` wrote, of one category")
    parser.add_argument("--data", help="with a test split; without it, drawn defects alone")
    parser.add_argument(
        "--contrast", type=float, nargs="+", help="of maps, to be compared with the model's own weights"
    )
    options = parser.parse_args()
    args = argparse.Namespace(**json.loads(Path(options.model, "training.json").read_text())["arguments"])
    good, _, categories = hold_out(read_good_images(args), args)
    training, unseen, _ = hold_out(good, args)
    if len(categories) > 1:
        raise SystemExit("This compares models of one category.")
    trained = AnomalyDenoisePipeline.from_pretrained(options.model)
    names = MAP_NAMES if trained.unet is not None else tuple(FEATURE_WEIGHTS)
    pipeline = with_settings(trained, weights=dict.fromkeys(names, 1.0), kl_sigma=0.0, feature_sigma=0.0)
    take_statistics(pipeline, training["image"], 0, args.seed, Accelerator(cpu=True))
    drawn = [measure_defects(pipeline, unseen["image"], 0, args.seed)]
    real = [measure_test(pipeline, options.data, args.seed)] if options.data else None
    if options.contrast:
        compare_contrasts(
            pipeline, options.contrast, [trained.weights.get(name, 0.0) for name in MAP_NAMES], drawn, real
        )
        return {}
    rows = []
    for some in simplex(len(names), WEIGHT_STEPS if trained.unet is not None else 2 * WEIGHT_STEPS):
        weights = tuple(dict(zip(names, some, strict=True)).get(name, 0.0) for name in MAP_NAMES)
        synthetic = rate_setting(pipeline, drawn, weights, 1.0, 1.0)
        tested = rate_setting(pipeline, real, weights, 1.0, 1.0, references=drawn) if real else None
        rows.append((weights, synthetic, tested))
    rows.sort(key=lambda row: -row[1]["objective"])
    chosen = tuple(trained.weights.get(name, 0.0) for name in MAP_NAMES)
    titles = [f"{which} {name}" for which in ("drawn", "real")[: 1 + bool(real)] for name in METRICS]
    print(f"{'weights of ' + ', '.join(MAP_NAMES):50} objective  " + "  ".join(titles))
    of_fit = tuple(FEATURE_WEIGHTS.get(name, 0.0) for name in MAP_NAMES)
    few = [row for row in rows if row in rows[:3] or max(row[0]) == 1.0 or row[0] == of_fit]
    for row in rows if trained.unet is None else few:
        values = [100 * found[metric] for found in row[1:] if found for metric in METRICS]
        numbers = "  ".join(f"{value:{len(title)}.1f}" for value, title in zip(values, titles, strict=True))
        print(f"{row[0]!s:50} {100 * row[1]['objective']:9.1f}  {numbers}{'  (the model)' if row[0] == chosen else ''}")
    found, tried = {}, [weights for weights, *_ in rows]
    for metric in METRICS if real else ():
        values = np.array([tested[metric] for *_, tested in rows])
        if np.isfinite(values).all():
            rank = spearmanr([synthetic["objective"] for _, synthetic, _ in rows], values).statistic
            found[metric] = {"spearman": float(rank), "best": values.max(), "mean": values.mean()}
            if chosen in tried:  # weights of a --config may be no multiples of a quarter
                found[metric]["chosen"] = values[tried.index(chosen)]
    print(json.dumps(found, indent=2))
    return found


if __name__ == "__main__":
    with torch.no_grad():
        main()
