#!/usr/bin/env python
"""A model in torch beside its exported files: how far maps are apart, whether verdicts agree, and what that costs.

diffad export runs/parts parts.onnx
python tests/benchmarks/evaluate_runtimes.py runs/parts --data DATA --files parts.onnx

Of each file: the largest relative error of a map (the norm of the difference by that of the map); how many verdicts
differ where the score is further than 1e-4 from the threshold; and, beside torch's, image AUROC and the shares of good
and of defective images that raise an alarm.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torchmetrics.functional.classification import binary_auroc

from diffad.commands.models import load_pipeline
from diffad.data import load_anomaly_dataset
from diffad.deployment import Runtime, RuntimeOutput
from diffad.deployment.export import InspectionGraph
from diffad.image_sizes import as_size
from diffad.reading.image_arrays import resized_array

MARGIN = 1e-4  # of the score, within which verdicts may differ
BATCH_SIZE = 16


def in_torch(graph: InspectionGraph, pixels: np.ndarray) -> RuntimeOutput:
    with torch.no_grad():
        outputs = graph(torch.from_numpy(pixels))
    named = zip(graph.output_names(len(outputs)), outputs, strict=True)
    return RuntimeOutput(**{name: value.numpy() for name, value in named})


def compare(
    pipeline: Any, runtimes: dict[str, Runtime], images: Iterable[tuple[Any, int]]
) -> dict[str, dict[str, Any]]:
    """Of torch and of each runtime, the figures above.

    Args:
        pipeline: calibrated, of one category.
        runtimes: of files that were exported from it, by name.
        images: each with its label, 1 for defective ones.
    """
    graph, size = InspectionGraph(pipeline), as_size(pipeline.input_resolution)
    threshold = float(pipeline.calibration.image_threshold[0])
    labels: list[int] = []
    scores: dict[str, list[float]] = {name: [] for name in ("torch", *runtimes)}
    alarms: dict[str, list[bool]] = {name: [] for name in scores}
    errors: dict[str, list[float]] = {name: [] for name in scores}
    remaining = iter(images)
    while batch := list(itertools.islice(remaining, BATCH_SIZE)):
        labels += [label for _, label in batch]
        pixels = np.stack([resized_array(image, size, pipeline.value_range) for image, _ in batch])
        expected = in_torch(graph, pixels)
        outputs = {"torch": expected, **{name: runtime.run(pixels) for name, runtime in runtimes.items()}}
        for name, output in outputs.items():
            difference = np.linalg.norm(output.anomaly_map - expected.anomaly_map, axis=(1, 2))
            errors[name] += (difference / np.linalg.norm(expected.anomaly_map, axis=(1, 2))).tolist()
            scores[name] += output.anomaly_score.tolist()
            alarms[name] += [] if output.is_anomalous is None else output.is_anomalous.tolist()
    is_clear = np.abs(np.array(scores["torch"]) - threshold) > MARGIN
    of_label = np.array(labels)
    results = {}
    for name in scores:
        raised = np.array(alarms[name])
        results[name] = {
            "images": len(labels),
            "largest_relative_map_error": max(errors[name]),
            "verdicts_that_differ": int((raised != np.array(alarms["torch"]))[is_clear].sum()),
            "image_auroc": float(binary_auroc(torch.tensor(scores[name]), torch.tensor(labels))),
            "false_alarms": float(raised[of_label == 0].mean()) if (of_label == 0).any() else None,
            "defects_found": float(raised[of_label == 1].mean()) if (of_label == 1).any() else None,
        }
    return results


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", help="folder of a pipeline")
    parser.add_argument("--data", required=True, help="data set with a test split")
    parser.add_argument("--files", nargs="+", required=True, help="exported from it")
    parser.add_argument("--max_images", type=int, default=500, help="of the test split (500)")
    args = parser.parse_args(argv)
    test = load_anomaly_dataset(args.data, "test")
    rows = (test[i] for i in range(min(len(test), args.max_images)))
    images = ((row["image"], row["label"]) for row in rows)
    print(json.dumps(compare(load_pipeline(args.model, "cpu"), {f: Runtime(f) for f in args.files}, images), indent=2))


if __name__ == "__main__":
    main()
