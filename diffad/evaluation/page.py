"""An evaluation on one page: a single HTML file with curves and pictures inside, which takes nothing from a network."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import PurePath
from typing import Any

import numpy as np
from jinja2 import Environment, Template
from PIL import Image

from diffad.evaluation.cases import PICTURE_HEIGHT, Case
from diffad.evaluation.figures import draw_figures, percent
from diffad.evaluation.metric_names import BASELINE_TITLES, MEAN, METRIC_TITLES


def render_report_page(
    report: Mapping[str, Any],
    curves: Mapping[str, Mapping[str, Any]],
    cases: Mapping[str, Sequence[Case]],
) -> str:
    """The page of an evaluation.

    Args:
        report: what `report.json` holds. Of it, only `results` is needed: the metrics of each category. `baselines`
            holds the same by name; `scores` holds records by category, for the histograms. A result's
            `image_threshold` is drawn where there is one.
        curves: by category, as of `AnomalyMetrics.curves`; a curve that is not there is not drawn.
        cases: by category, in the order in which they are shown.

    Returns:
        An HTML document. Every string of the report is escaped.

    Raises:
        ValueError: a picture is not (H, W, 3) uint8.
    """
    results = {name: result for name, result in report["results"].items() if name != MEAN}
    rows: list[tuple[str, str | None, Any]] = [
        (name, f"category-{i}", result) for i, (name, result) in enumerate(results.items(), 1)
    ]
    if len(results) > 1 and MEAN in report["results"]:
        rows.append((MEAN, None, report["results"][MEAN]))
    baselines = {
        BASELINE_TITLES.get(name, name): of_category for name, of_category in (report.get("baselines") or {}).items()
    }
    for title, of_category in baselines.items():
        # of one category, this one's; of several, their mean
        row = of_category.get(MEAN) or of_category.get(next(iter(results), None)) or {}
        rows.append((f"{title}, {MEAN}" if len(results) > 1 else title, None, row))
    by_category = {
        title: [(name, None, of_category.get(name) or {}) for name in results]
        for title, of_category in baselines.items()
    }
    shown = [row for _, _, row in rows] + [row for of_one in by_category.values() for _, _, row in of_one]
    columns = {name: title for name, title in METRIC_TITLES.items() if any(row.get(name) is not None for row in shown)}
    return _template().render(
        title=_title(report),
        facts=_facts(report),
        columns=columns,
        rows=rows,
        num_categories=len(results),
        by_category=by_category if len(results) > 1 else {},
        sections=[
            {
                "id": f"category-{i}",
                "name": name,
                "facts": _category_facts(result, report.get("scores", {}).get(name) or []),
                "figures": draw_figures(result, report.get("scores", {}).get(name) or [], curves.get(name) or {}),
                "groups": _groups(cases.get(name) or []),
            }
            for i, (name, result) in enumerate(results.items(), 1)
        ],
        percent=percent,
        data_uri=_data_uri,
    )


def _title(report: Mapping[str, Any]) -> str:
    model = report.get("model")
    if not model:
        return "Evaluation"
    path = PurePath(model)
    return f"Evaluation of {path.name if path.is_absolute() else model}"


def _facts(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    machine = report.get("machine") or {}
    versions = [f"{name} {machine[name]}" for name in ("torch", "diffad") if name in machine]
    rows = [
        ("model", report.get("model")),
        ("data", report.get("data")),
        ("seed", report.get("seed")),
        ("machine", ", ".join(filter(None, [machine.get("device"), machine.get("platform"), *versions]))),
        ("mixed precision", report.get("mixed_precision")),
        ("maps", f"{report['resolution']} x {report['resolution']} px" if "resolution" in report else None),
        ("command", report.get("command")),
    ]
    return [(name, str(value)) for name, value in rows if value not in (None, "")]


def _category_facts(result: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    facts = [("good images", result.get("good_images")), ("defective images", result.get("defective_images"))]
    for name, title, label in (("false_alarms", "false alarms", 0), ("defects_found", "defects found", 1)):
        if result.get(name) is not None:
            alarms = [record["is_anomalous"] for record in records if record["label"] == label]
            of_all = f" ({sum(alarms)} of {len(alarms)})" if alarms and None not in alarms else ""
            facts.append((title, f"{percent(result[name])}%{of_all}"))
    if result.get("allowed_false_alarms") is not None:
        rate, bound = (percent(result.get(f"allowed_false_alarms{of}")) for of in ("", "_95"))
        about = "" if result.get("allowed_is_exact", True) else "about "
        facts.append(("allowed", f"{about}{rate}% on average, {about}{bound}% at most with 95% confidence"))
    if "false_alarms" not in result:
        facts.append(("alarms", "none, as the model is not calibrated"))
    if result.get("images_per_second") is not None:
        facts.append(("images/s", f"{result['images_per_second']:.3g}"))
    return [(name, str(value)) for name, value in facts if value is not None]


def _groups(cases: Sequence[Case]) -> list[tuple[str, list[Case]]]:
    groups: dict[str, list[Case]] = {}
    for case in cases:
        groups.setdefault(case.title, []).append(case)
    return list(groups.items())


def _data_uri(picture: np.ndarray) -> str:
    picture = np.asarray(picture)
    if picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != np.uint8 or 0 in picture.shape:
        raise ValueError(f"`picture` must be (H, W, 3) uint8, but is {picture.dtype} of shape {picture.shape}.")
    image = Image.fromarray(picture)
    image.thumbnail((8 * PICTURE_HEIGHT, PICTURE_HEIGHT), Image.Resampling.LANCZOS)
    content = io.BytesIO()
    image.save(content, format="JPEG", quality=85, subsampling=0, optimize=True)  # thin outlines keep their colour
    return f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}"


def _template() -> Template:
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(files("diffad.evaluation").joinpath("page.html").read_text(encoding="utf-8"))
