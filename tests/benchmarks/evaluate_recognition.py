#!/usr/bin/env python
"""How often a model of several categories recognises which one a test image is of (`recognise`).

python tests/benchmarks/evaluate_recognition.py MODEL --data DATA
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np

from diffad.commands.models import load_pipeline
from diffad.data import load_anomaly_dataset
from diffad.images import ImageSequence


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", help="folder or Hub id of a calibrated pipeline")
    parser.add_argument("--data", required=True, help="data set with a test split")
    parser.add_argument("--batch_size", type=int, default=16, help="images a pass (16)")
    args = parser.parse_args(argv)
    pipeline = load_pipeline(args.model)
    test = load_anomaly_dataset(args.data, split="test")
    labels, categories = np.asarray(test["label"]), np.asarray(test["category"])
    for name in pipeline.categories:
        shares = []
        for label in (0, 1):
            rows = np.flatnonzero((categories == name) & (labels == label)).tolist()
            if not rows:
                continue
            images = ImageSequence.of_rows(test["image"], rows, pipeline.value_range)
            found = np.asarray(pipeline.recognise(images, args.batch_size))
            right = int((found == pipeline.category_index(name)).sum())
            shares.append(f"{right} of {len(rows)} {'defective' if label else 'good'} ones")
        print(f"{name}: recognised {', '.join(shares)}", flush=True)


if __name__ == "__main__":
    main()
