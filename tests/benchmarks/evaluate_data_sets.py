#!/usr/bin/env python
"""`diffad fit` or `diffad train` on several data sets and seeds, evaluated beside PaDiM: one table.

    python tests/benchmarks/evaluate_data_sets.py DATA... --output runs/data_sets [--command fit] [--seeds 0 1 2]

Each run is the shipped command with data and output alone, in a process of its own, then `training/evaluate.py`. What
is done stays in the output folder, `COMMAND-DATA-seed-N/report.json`, so the same command goes on where it was stopped.
The table, `table.json`, holds means and deviations over the seeds, and a 95% interval of the mean image AUROC: 2,000
bootstrap samples of the test images, good and defective ones apart, the same for all seeds.
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
from typing import Any

import numpy as np

from diffad.evaluation.metric_names import METRIC_TITLES
from diffad.files import write_text_whole

NUM_SAMPLES = 2000


def evaluate(data: str, command: str, seed: int, folder: Path, minutes: float, with_padim: bool) -> dict[str, Any]:
    """The report of one run, made unless it is there. PaDiM draws nothing, so one seed's is enough."""
    report = folder / "report.json"
    if report.exists():
        known = json.loads(report.read_text(encoding="utf-8"))
        if known["baselines"] or not with_padim:
            return known
    model, flags = folder / "model", ["--minutes", str(minutes)] if command == "train" else []
    started = time.time()
    run("diffad.cli", command, data, "--output", str(model), "--seed", str(seed), *flags)
    seconds = time.time() - started
    found = folder / "found.json"
    run(
        *("diffad.training.evaluate", "--model", str(model), "--data", data, "--output", str(found)),
        *("--baselines", "padim" if with_padim else "none"),
    )
    result = json.loads(found.read_text(encoding="utf-8")) | {"seconds": round(seconds, 1)}
    write_text_whole(report, json.dumps(result, indent=1) + "\n")
    return result


def run(module: str, *arguments: str) -> None:
    subprocess.run([sys.executable, "-m", module, *arguments], check=True)


def auroc_interval(reports: Sequence[dict[str, Any]], category: str) -> tuple[float, float]:
    """Of the mean over the seeds, by bootstrap over images."""
    labels = np.asarray([row["label"] for row in reports[0]["scores"][category]])
    scores = np.asarray([[row["score"] for row in report["scores"][category]] for report in reports])  # (seeds, N)
    good, bad = scores[:, labels == 0], scores[:, labels == 1]
    above = (bad[:, :, None] > good[:, None]) + 0.5 * (bad[:, :, None] == good[:, None])
    above = above.mean(axis=0)  # (bad, good): its mean over all pairs is the seeds' mean AUROC
    generator = np.random.default_rng(0)
    values = [
        above[np.ix_(*(generator.integers(count, size=count) for count in above.shape))].mean()
        for _ in range(NUM_SAMPLES)
    ]
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


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
        row["image_auroc_interval"] = auroc_interval(reports, category)
        row["seconds"] = [report["seconds"] for report in reports]
        row["padim"] = reports[0]["baselines"].get("padim", {}).get(category)
        table[category] = row
    return table


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("data", nargs="+", help="data sets, as `diffad fit` takes them")
    parser.add_argument("--output", type=Path, required=True, help="gets the models, reports and table.json")
    parser.add_argument("--command", choices=["fit", "train"], default="fit")
    parser.add_argument("--minutes", type=float, default=20.0, help="of each training (20)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args(argv)
    table = {}
    for data in args.data:
        name = re.sub(r"[^\w.]+", "-", f"{args.command} {data}").strip("-")
        name += f"-{args.minutes:g}-minutes" if args.command == "train" else ""
        folders = [args.output / f"{name}-seed-{seed}" for seed in args.seeds]
        reports = []
        for seed, folder in zip(args.seeds, folders, strict=True):
            folder.mkdir(parents=True, exist_ok=True)
            reports.append(evaluate(data, args.command, seed, folder, args.minutes, with_padim=not reports))
        table[data] = summarise(reports)
        record = {"command": args.command, "seeds": args.seeds, "machine": reports[0]["machine"], "results": table}
        write_text_whole(args.output / "table.json", json.dumps(record, indent=1) + "\n")
        for category, row in table[data].items():
            shown = ", ".join(f"{METRIC_TITLES[n]} {100 * row[n][0]:.1f}" for n in METRIC_TITLES if n in row)
            print(f"{data} {category}: {shown}", flush=True)


if __name__ == "__main__":
    main()
