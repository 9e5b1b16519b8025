#!/usr/bin/env python
"""Evaluates a saved pipeline on a data set's test split, on any number of processes.

    accelerate launch training/evaluate.py --model runs/mine --data DIR --output report.json

Numbers do not depend on the number of processes: each image draws its noise from its own seed, and metrics are sums.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from datasets import Dataset
from diffusers import DiffusionPipeline
from PIL import Image
from tqdm.auto import tqdm

import diffad
from diffad.data import load_anomaly_dataset, resize_image_and_mask
from diffad.metrics import AnomalyMetrics
from diffad.prediction import image_generator

# the order of the papers' tables
METRIC_TITLES = {
    "image_auroc": "image AUROC",
    "image_ap": "image AP",
    "image_f1max": "image F1-max",
    "pixel_auroc": "pixel AUROC",
    "pixel_ap": "pixel AP",
    "pixel_f1max": "pixel F1-max",
    "pixel_pro": "PRO",
}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Evaluates a saved pipeline.")
    parser.add_argument("--model", required=True, help="folder or Hub id of a pipeline")
    parser.add_argument("--data", required=True, help="data set's folder or Hub id, or 'elpv'")
    parser.add_argument("--dataset", help="force a layout (mvtec_ad, visa, ...)")
    parser.add_argument("--category", nargs="+", help="only these categories")
    parser.add_argument("--output", default="report.json", help="the report (report.json)")
    parser.add_argument("--resolution", type=int, default=256, help="pixels a side at which maps meet masks (256)")
    parser.add_argument("--pro_fpr_limit", type=float, default=0.3, help="of PRO (0.3)")
    parser.add_argument("--batch_size", type=int, default=16, help="images a batch (16)")
    parser.add_argument("--mixed_precision", choices=("no", "fp16", "bf16"), help="(accelerate's setting)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (0)")
    parser.add_argument("--save_maps", metavar="DIR", help="float32 TIFF maps, as MVTec's own evaluation reads them")
    parser.add_argument("--resume", action="store_true", help="keep the categories that --output already holds")
    return parser.parse_args(argv)


def describe_machine() -> dict[str, Any]:
    """What a number depends on beside code and seed."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "device": gpu or f"{os.cpu_count()} CPU cores",
        "platform": platform.platform(terse=True),
        "torch": torch.__version__,
        "diffad": diffad.__version__,
    }


@torch.no_grad()
def evaluate_category(
    pipeline: Any,
    images: Dataset,
    category: str,
    accelerator: Accelerator,
    resolution: int = 256,
    pro_fpr_limit: float = 0.3,
    batch_size: int = 16,
    seed: int = 0,
    save_maps: str | Path | None = None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Metrics of one category's test images, and each image's score.

    Returns:
        The metrics with the number of images and the seconds it took, and records of path, label, defect, score,
        p_value and is_anomalous, in the data set's order; the same on every process.
    """
    metrics = AnomalyMetrics(pro_fpr_limit=pro_fpr_limit)
    unified = len(pipeline.config.categories or []) > 1
    started = time.time()
    records = []
    # this process's share, without the padding that would count images twice
    with accelerator.split_between_processes(list(range(len(images)))) as mine:
        starts = range(0, len(mine), batch_size)
        for start in tqdm(starts, desc=category, disable=not accelerator.is_local_main_process):
            indices = mine[start : start + batch_size]
            rows = [images[i] for i in indices]
            with accelerator.autocast():
                output = pipeline(
                    [row["image"] for row in rows],
                    batch_size=batch_size,
                    match_input_resolution=False,
                    generator=[image_generator(seed, i) for i in indices],
                    output_type="pt",
                    **({"category": category} if unified else {}),
                )
            maps = torch.nn.functional.interpolate(
                output.anomaly_map[:, None], (resolution, resolution), mode="bilinear"
            )[:, 0]
            masks = [_mask(row, resolution) for row in rows]
            metrics.update(anomaly_score=output.anomaly_score, label=torch.tensor([row["label"] for row in rows]))
            known = [j for j, mask in enumerate(masks) if mask is not None]
            if known:  # image by image, so that no result depends on what shares a batch
                metrics.update(anomaly_map=maps[known], mask=np.stack([masks[j] for j in known]))
            for j, row in enumerate(rows):
                records.append(
                    {
                        "index": indices[j],
                        "path": row["path"],
                        "label": row["label"],
                        "defect": row["defect"],
                        "score": float(output.anomaly_score[j]),
                        "p_value": None if output.p_value is None else float(output.p_value[j]),
                        "is_anomalous": None if output.is_anomalous is None else bool(output.is_anomalous[j]),
                    }
                )
                if save_maps is not None:
                    name = Path(row["path"]).stem or f"{indices[j]:06d}"
                    path = Path(save_maps, category, "test", row["defect"], f"{name}.tiff")
                    path.parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(maps[j].numpy()).save(path)
    result = metrics.compute()
    seconds = time.time() - started
    records = sorted(gather_object(records), key=lambda record: record.pop("index"))
    labels = [record["label"] for record in records]
    result = {name: None if np.isnan(value) else round(value, 6) for name, value in result.items()}
    if records and records[0]["is_anomalous"] is not None:
        good = [r["is_anomalous"] for r in records if not r["label"]]
        bad = [r["is_anomalous"] for r in records if r["label"]]
        result["false_alarms"] = round(float(np.mean(good)), 6) if good else None
        result["defects_found"] = round(float(np.mean(bad)), 6) if bad else None
    result.update(
        good_images=labels.count(0),
        defective_images=labels.count(1),
        seconds=round(seconds, 2),
        images_per_second=round(len(records) / seconds, 2),
    )
    return result, records


def _mask(row: dict[str, Any], resolution: int) -> np.ndarray | None:
    """(resolution, resolution) bool; None where a defective image has no mask."""
    if row["mask"] is None:
        return None if row["label"] else np.zeros((resolution, resolution), dtype=bool)
    return resize_image_and_mask(row["image"], row["mask"], (resolution, resolution))[1]


def mean_over_categories(results: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Metrics averaged over categories; a metric that one category lacks is left out."""
    columns = {name: [result.get(name) for result in results.values()] for name in METRIC_TITLES}
    return {name: round(float(np.mean(column)), 6) for name, column in columns.items() if column and None not in column}


def markdown_table(results: dict[str, dict[str, Any]]) -> str:
    """A row for each category, metrics in percent and in the papers' order."""
    names = [name for name in METRIC_TITLES if any(result.get(name) is not None for result in results.values())]
    lines = [
        "| category | " + " | ".join(METRIC_TITLES[name] for name in names) + " |",
        "|---" * (len(names) + 1) + "|",
    ]
    for category, result in results.items():
        cells = ["" if result.get(name) is None else f"{100.0 * result[name]:.1f}" for name in names]
        lines.append(f"| {category} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def save_report(report: dict[str, Any], path: Path) -> None:
    """Writes `path` (JSON), and beside it the table as .csv and .md; each at once, by renaming."""
    results = report["results"]
    rows = [["category", *METRIC_TITLES]]
    rows += [[category, *(result.get(name) for name in METRIC_TITLES)] for category, result in results.items()]
    table = io.StringIO()
    csv.writer(table).writerows(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    for suffix, text in (
        (".csv", table.getvalue()),
        (".md", markdown_table(results)),
        (path.suffix, json.dumps(report, indent=2) + "\n"),
    ):
        unfinished = path.with_name(f".{path.stem}{suffix}.unfinished")
        unfinished.write_text(text)
        unfinished.replace(path.with_suffix(suffix))


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    args = parse_args(argv)
    accelerator = Accelerator(mixed_precision=args.mixed_precision)
    path = Path(args.output)
    if path.suffix != ".json":
        raise ValueError(f"--output must end in .json, but is {path}.")
    dataset = load_anomaly_dataset(args.data, split="test", category=args.category, dataset=args.dataset)
    pipeline = DiffusionPipeline.from_pretrained(args.model).to(accelerator.device)
    pipeline.set_progress_bar_config(disable=True)
    settings = {
        "model": args.model,
        "data": args.data,
        "seed": args.seed,
        "resolution": args.resolution,
        "pro_fpr_limit": args.pro_fpr_limit,
        "mixed_precision": accelerator.mixed_precision,
    }
    report: dict[str, Any] = {
        **settings,
        "command": f"diffad evaluate {args.model} --data {args.data}",
        "processes": accelerator.num_processes,
        "machine": describe_machine(),
        "results": {},
        "scores": {},
    }
    if args.resume and path.is_file():
        earlier = json.loads(path.read_text())
        changed = [name for name, value in settings.items() if earlier.get(name) != value]
        if changed:
            raise ValueError(f"--resume: {path} was made with another {', '.join(changed)}. Choose another --output.")
        report["results"] = {k: v for k, v in earlier["results"].items() if k != "mean"}
        report["scores"] = earlier["scores"]
    accelerator.wait_for_everyone()  # nobody reads the report after it is written again
    of_image = np.asarray(dataset["category"])
    for category in sorted(set(of_image.tolist()) - set(report["results"])):
        result, records = evaluate_category(
            pipeline,
            dataset.select(np.flatnonzero(of_image == category)),
            category,
            accelerator,
            args.resolution,
            args.pro_fpr_limit,
            args.batch_size,
            args.seed,
            args.save_maps,
        )
        report["results"] = {**{k: v for k, v in report["results"].items() if k != "mean"}, category: result}
        report["results"]["mean"] = mean_over_categories(report["results"])
        report["scores"][category] = records
        if accelerator.is_main_process:
            save_report(report, path)
    if accelerator.is_main_process:
        print(markdown_table(report["results"]) + f"Report: {path}")
    accelerator.wait_for_everyone()
    accelerator.end_training()  # a process that exits with its group still open may abort
    return report


if __name__ == "__main__":
    main()
