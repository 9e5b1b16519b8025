#!/usr/bin/env python
"""Which backbone and size outline defects best: synthetic ones, on good images held out, beside a test split's.

    python tests/benchmarks/evaluate_backbones.py DATA... [--backbones tf_efficientnet_lite0@224 NAME@SIDE ...]

Each backbone's features have the Gaussian and the nearest patches of `diffad fit`, at its weights. Synthetic defects
are what a choice may look at; the test split's figures stand beside them to show what the choice is worth.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from evaluate_choice import METRICS, measure_test

from diffad import AnomalyDenoisePipeline, TimmFeatureExtractor
from diffad.models.gaussian_feature_model import one_size
from diffad.pipelines.checks import MAP_NAMES
from diffad.pipelines.feature_maps import FEATURE_WEIGHTS
from diffad.training.choice import measure_defects, rate_setting, take_statistics
from diffad.training.data import hold_out, read_good_images
from diffad.training.fit import parse_args as fit_arguments
from diffad.training.fit import standardise_channels

BACKBONES = ("tf_efficientnet_lite0@224", "tf_efficientnet_lite1@240", "tf_efficientnet_lite2@256")
SIGMA = 1.0  # px of the map


def evaluate(data: str, backbone: str, side: str, seed: int) -> dict[str, Any]:
    """What one backbone reaches on one category, by synthetic and by real defects."""
    args = fit_arguments(["--train_data_dir", data, "--backbone", backbone, "--resolution", side, "--seed", str(seed)])
    torch.manual_seed(seed)
    training, unseen, categories = hold_out(read_good_images(args), args)
    if len(categories) > 1:
        raise SystemExit(f"{data} holds several categories. Give one by DATA/CATEGORY.")
    extractor = TimmFeatureExtractor.from_backbone(
        args.backbone, args.feature_strides, one_size(args.resolution), args.backbone_weights, args.feature_layers
    )
    standardise_channels(extractor, training, args, categories, torch.device("cpu"))
    pipeline = AnomalyDenoisePipeline(None, None, extractor, position_trust=0.0, weights=FEATURE_WEIGHTS)
    pipeline.set_progress_bar_config(disable=True)
    started = time.perf_counter()
    take_statistics(pipeline, training["image"], 0, seed, Accelerator(cpu=True))
    seconds = time.perf_counter() - started
    drawn = [measure_defects(pipeline, unseen["image"], 0, seed)]
    real = [measure_test(pipeline, data, seed)]
    weights = [FEATURE_WEIGHTS.get(name, 0.0) for name in MAP_NAMES]
    synthetic = rate_setting(pipeline, drawn, weights, 1.0, SIGMA)
    tested = rate_setting(pipeline, real, weights, 1.0, SIGMA, references=drawn)
    return {
        "data": data,
        "backbone": backbone,
        "side": int(side),
        "channels": extractor.num_channels,
        "statistics_seconds": round(seconds, 1),
        "synthetic": {name: synthetic[name] for name in METRICS},
        "test": {name: tested[name] for name in METRICS},
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("data", nargs="+", help="data sets of one category, with a test split")
    parser.add_argument("--backbones", nargs="+", default=list(BACKBONES), metavar="NAME@SIDE")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="JSON file for what was found")
    args = parser.parse_args(argv)
    found = []
    print(f"{'':40} synthetic: AUROC    AP   PRO   test: AUROC    AP   PRO")
    for data in args.data:
        for name in args.backbones:
            backbone, _, side = name.partition("@")
            one = evaluate(data, backbone, side or "224", args.seed)
            found.append(one)
            figures = [100.0 * one[part][metric] for part in ("synthetic", "test") for metric in METRICS]
            label = f"{Path(data).name} {name.removeprefix('tf_')} ({one['channels']} channels)"
            print("{:50} {:6.1f} {:5.1f} {:5.1f} {:13.1f} {:5.1f} {:5.1f}".format(label, *figures), flush=True)
    if args.output is not None:
        args.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
