"""How many new good parts raise an alarm, by thresholds of images left out in turn and by those of a fifth held out.

    python tests/benchmarks/evaluate_leave_one_out.py runs/parts --data DATA

takes a model of `diffad fit`. Again and again some good images of the training split are drawn at random. The model is
calibrated to them in both ways, and the others are new parts, whose p-values say how many of them would raise an alarm
at any rate.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import numpy as np
import torch

from diffad import AnomalyDenoisePipeline
from diffad.data import load_anomaly_dataset

RATES = (0.01, 0.02, 0.05, 0.1, 0.2)
HELD_OUT = 0.2  # of the images, as `diffad fit --calibration-fraction 0.2`


def new_p_values(
    pipeline: AnomalyDenoisePipeline, images: Any, chosen: list[int], others: list[int], left_out: bool
) -> np.ndarray:
    """Those of `others`, by a calibration to `chosen`."""
    held_out = [] if left_out else chosen[: round(HELD_OUT * len(chosen))]
    statistics = [images[i] for i in chosen[len(held_out) :]]
    if left_out:
        pipeline.calibrate(statistics, leave_one_out=True)
    else:
        pipeline.calibrate([images[i] for i in held_out], statistics)
    found = []
    for start in range(0, len(others), 16):
        batch = [images[i] for i in others[start : start + 16]]
        found.append(pipeline(batch, match_input_resolution=False).p_value)
    return np.concatenate(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder that `diffad fit` wrote, of one category")
    parser.add_argument("--data", required=True, help="data set with good images to train on")
    parser.add_argument("--count", type=int, default=100, help="images of a calibration (100)")
    parser.add_argument("--new", type=int, default=100, help="most new parts of each (100)")
    parser.add_argument("--repeats", type=int, default=10, help="draws (10)")
    args = parser.parse_args()
    training = load_anomaly_dataset(args.data, "train")
    images = training.select(np.flatnonzero(np.asarray(training["label"]) == 0))["image"]
    pipeline = AnomalyDenoisePipeline.from_pretrained(args.model)
    pipeline.set_progress_bar_config(disable=True)
    found: dict[str, list[np.ndarray]] = {"left out in turn": [], "a fifth held out": []}
    for repeat in range(args.repeats):
        order = np.random.default_rng(repeat).permutation(len(images)).tolist()
        chosen, others = order[: args.count], order[args.count : args.count + args.new]
        for name, p_values in found.items():
            p_values.append(new_p_values(pipeline, images, chosen, others, name == "left out in turn"))
    rows = {}
    for name, p_values in found.items():
        together = np.concatenate(p_values)
        smallest = 1.0 / (1 + (args.count if name == "left out in turn" else round(HELD_OUT * args.count)))
        rows[name] = {
            "alarms": {f"{rate:g}": float((together <= rate).mean()) for rate in RATES if rate >= smallest},
            "mean_p_value": float(together.mean()),
        }
        text = ", ".join(f"{100 * share:.1f}% at {float(rate):.0%}" for rate, share in rows[name]["alarms"].items())
        print(f"{name}: of {len(together)} new good parts {text}; mean p-value {together.mean():.3f}")
    print(json.dumps(rows))


if __name__ == "__main__":
    with torch.no_grad():
        main()
