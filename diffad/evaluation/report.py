"""The report of an evaluation: what it holds, and the JSON, tables and page that it is written to."""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import json
import os
import platform
import shlex
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset

import diffad
from diffad.evaluation.cases import draw_cases, save_sheets
from diffad.evaluation.metric_names import BASELINE_TITLES, MEAN, METRIC_TITLES
from diffad.evaluation.page import render_report_page
from diffad.files import read_json_object, write_text_whole
from diffad.model_folder import check_writable
from diffad.reading.inputs import REPORT_SHEETS

# what a report must agree in with the one that it goes on with
SETTINGS = ("model", "model_files", "data", "noise", "resolution", "pro_fpr_limit", "mixed_precision")


def describe_machine() -> dict[str, Any]:
    """What a number depends on beside code and seed."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "device": gpu or f"{os.cpu_count()} CPU cores",
        "platform": platform.platform(terse=True),
        "torch": torch.__version__,
        "diffad": diffad.__version__,
    }


def mean_over_categories(results: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Metrics averaged over categories; a metric that one category lacks is left out."""
    values = list(results.values())
    shared = [name for name in METRIC_TITLES if values and all(result.get(name) is not None for result in values)]
    return {name: round(float(np.mean([result[name] for result in values])), 6) for name in shared}


def with_mean(results: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Results by category, and their mean as the last."""
    categories = {name: result for name, result in results.items() if name != MEAN}
    return {**categories, MEAN: mean_over_categories(categories)}


def markdown_table(rows: dict[str, dict[str, Any]], head: str = "category") -> str:
    """A row of metrics for each title, in percent and in the papers' order; a metric that no row has is left out.

    `head` stands above the titles.
    """
    names = [name for name in METRIC_TITLES if any(result.get(name) is not None for result in rows.values())]
    lines = [
        f"| {' | '.join([head, *(METRIC_TITLES[name] for name in names)])} |",
        "|---" * (len(names) + 1) + "|",
    ]
    for title, result in rows.items():
        title = title.replace("|", "\\|")  # of a category, which would end its cell
        cells = ["" if result.get(name) is None else f"{100.0 * result[name]:.1f}" for name in names]
        lines.append(f"| {' | '.join([title, *cells])} |")
    return "\n".join(lines) + "\n"


def report_markdown(report: dict[str, Any]) -> str:
    """A row for each category and their mean, then each baseline's mean."""
    baselines = {BASELINE_TITLES[name]: of_category[MEAN] for name, of_category in report["baselines"].items()}
    return markdown_table({**report["results"], **baselines})


def save_report(report: dict[str, Any], path: Path) -> None:
    """Writes `path` (JSON), and beside it the table as .csv and .md; each at once, by renaming."""
    rows = [["method", "category", *METRIC_TITLES]]
    for method, of_category in {"": report["results"], **report["baselines"]}.items():
        for category, result in of_category.items():
            rows.append([method, category, *(result.get(name) for name in METRIC_TITLES)])
    table = io.StringIO()
    csv.writer(table).writerows(rows)
    texts = {path.suffix: json.dumps(report, indent=2) + "\n", ".csv": table.getvalue(), ".md": report_markdown(report)}
    write_files(path, texts)


def read_report(path: Path) -> dict[str, Any]:
    """The report at `path`.

    Raises:
        ValueError: what stands there is none.
    """
    report = read_json_object(path)
    if not isinstance(report.get("results"), dict):
        raise ValueError(f"`output`: {path} is no report of diffad's, and would be replaced. Give another file.")
    return report


def check_report_path(path: Path) -> None:
    """Says before anything is measured that a report cannot stand at `path`.

    Raises:
        ValueError: it, or what goes beside it, would replace another program's files.
        OSError: nothing can be written there.
    """
    if path.is_dir():
        raise ValueError(f"`output` must be a file, but {path} is a folder.")
    check_writable(path.parent)
    if path.exists():
        read_report(path)
        return
    beside = [path.with_suffix(suffix) for suffix in (".csv", ".md", ".html")]
    beside += [path.with_name(path.stem + ending) for ending in REPORT_SHEETS]
    if others := [one for one in beside if one.exists()]:
        raise ValueError(f"`output`: {others[0]} would be replaced, and is of no report. Give another file.")


def take_up_report(report: dict[str, Any], path: Path, categories: Collection[str]) -> None:
    """Puts the categories that the report at `path` holds into a new one.

    Raises:
        ValueError: it is no report, was made with other settings or baselines, or holds a category that is none of
            `categories`.
    """
    earlier = read_report(path)
    changed = [name for name in SETTINGS if earlier.get(name) != report[name]]
    if sorted(earlier.get("baselines", {})) != sorted(report["baselines"]):
        changed.append("baselines")
    if set(earlier["results"]) - {MEAN} - set(categories):
        changed.append("category")
    if changed:
        raise ValueError(f"--resume: {path} was made with another {', '.join(changed)}. Choose another --output.")
    report.update({name: earlier.get(name, {}) for name in ("results", "baselines", "scores", "curves")})


def save_page(report: dict[str, Any], pipeline: Any, images: dict[str, Dataset], path: Path) -> None:
    """Writes the page (.html), with pictures of the cases that tell most, and their contact sheets beside `path`."""
    cases = {
        category: draw_cases(pipeline, images[category], records, category)
        for category, records in report["scores"].items()
    }
    write_files(path, {".html": render_report_page(report, report["curves"], cases)})
    save_sheets(cases, path)


def write_files(path: Path, texts: dict[str, str]) -> None:
    """Writes texts to `path` with other suffixes, each under another name first and then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for suffix, text in texts.items():
        write_text_whole(path.with_suffix(suffix), text)


def fingerprint(model: str) -> str | None:
    """Changes when a folder's pipeline is trained or calibrated anew; None for one on the Hub."""
    paths = [*Path(model).glob("model_index.json"), *sorted(Path(model).glob("*/*.safetensors"))]
    parts = [f"{path.relative_to(model)} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in paths]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16] if parts else None


def command_line(module: str, args: argparse.Namespace, parser: argparse.ArgumentParser) -> str:
    """The command that makes the same report again: every argument that is not its default."""
    words = ["accelerate", "launch", "-m", module]
    for name, value in vars(args).items():
        if value in (parser.get_default(name), None, False) or name == "resume":
            continue
        values = value if isinstance(value, list) else [] if value is True else [value]
        words += [f"--{name}", *map(str, values)]
    return shlex.join(words)
