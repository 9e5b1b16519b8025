"""An evaluation on one page: a single HTML file with curves and pictures inside, which takes nothing from a network.

Curves and histograms are SVG whose colours are the page's own, so that they follow its light and its dark scheme.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import numpy as np
from jinja2 import Environment
from markupsafe import Markup
from matplotlib.ticker import MaxNLocator
from PIL import Image

from diffad.model_card import BASELINE_TITLES, MEAN, METRICS

# the order of the papers' tables; DICE and the rates at the threshold are no columns there
METRIC_TITLES = {name: METRICS[name][2] for name in METRICS if name.split("_")[0] in ("image", "pixel")}
del METRIC_TITLES["pixel_dice"]

# `AnomalyMetrics.curves`' name: title, metric, axes; in the order in which they are shown
CURVES = {
    "image_roc": ("ROC of images", "image_auroc", "AUROC", "true-positive rate"),
    "pixel_roc": ("ROC of pixels", "pixel_auroc", "AUROC", "true-positive rate"),
    "pro": ("Per-region overlap", "pixel_pro", "PRO", "per-region overlap"),
}

# of a figure, in the units of its view box: size, and where its axes stand
WIDTH, HEIGHT = 320, 220
LEFT, RIGHT, TOP, BOTTOM = 44, 312, 8, 182
MOST_BARS = 40
PICTURE_HEIGHT = 256  # pixels of a case's picture; larger ones are scaled down to it


@dataclass(frozen=True)
class Case:
    """A picture worth a look.

    Args:
        title: of its group, such as "defective, lowest score"; neighbours with one title stand together.
        caption: its file, score and verdict, as from `case_caption`.
        picture: (H, W, 3) uint8, the image and its overlay side by side.
    """

    title: str
    caption: str
    picture: np.ndarray


def choose_cases(records: Sequence[Mapping[str, Any]], count: int = 4) -> dict[str, list[int]]:
    """Which images to show: the extremes of either kind, so that the errors show too.

    Args:
        records: of one category, as in a report's `scores`.
        count: images a group, at most.

    Returns:
        Indices into `records` by title: defective images with the highest and the lowest scores, good ones with the
        highest and the lowest. The most extreme stands first; no image stands twice; empty groups are left out.
    """
    groups = {}
    for label, kind in ((1, "defective"), (0, "good")):
        of_kind = [i for i, record in enumerate(records) if record["label"] == label]
        ordered = sorted(of_kind, key=lambda i: records[i]["score"], reverse=True)
        highest = ordered[: min(count, (len(ordered) + 1) // 2)]
        groups[f"{kind}, highest score"] = highest
        groups[f"{kind}, lowest score"] = ordered[len(highest) :][::-1][:count]
    return {title: indices for title, indices in groups.items() if indices}


def case_caption(record: Mapping[str, Any]) -> str:
    """File name, kind of defect, score, p-value and verdict of one record of a report's `scores`."""
    defect = record.get("defect")
    kind = f" ({defect})" if record["label"] and defect not in (None, "", "defective") else ""
    parts = [f"score {record['score']:.4g}"]
    if record.get("p_value") is not None:
        parts.append(f"p = {record['p_value']:.2g}")
    if record.get("is_anomalous") is not None:
        words = ("missed", "found") if record["label"] else ("passed", "false alarm")
        parts.append(words[int(record["is_anomalous"])])
    return f"{PurePath(record['path']).name}{kind}: {', '.join(parts)}"


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
    rows = [(name, f"category-{i}", result) for i, (name, result) in enumerate(results.items(), 1)]
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
    return _TEMPLATE.render(
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
                "figures": _figures(result, report.get("scores", {}).get(name) or [], curves.get(name) or {}),
                "groups": _groups(cases.get(name) or []),
            }
            for i, (name, result) in enumerate(results.items(), 1)
        ],
        style=Markup(_STYLE),
        percent=_percent,
        data_uri=_data_uri,
    )


# -- facts -------------------------------------------------------------------------------------------------------


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
            facts.append((title, f"{_percent(result[name])}%{of_all}"))
    if "false_alarms" not in result:
        facts.append(("alarms", "none, as the model is not calibrated"))
    if result.get("images_per_second") is not None:
        facts.append(("images/s", f"{result['images_per_second']:.3g}"))
    return [(name, str(value)) for name, value in facts if value is not None]


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100.0 * value:.1f}"


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


# -- figures -----------------------------------------------------------------------------------------------------


def _figures(
    result: Mapping[str, Any], records: Sequence[Mapping[str, Any]], curves: Mapping[str, Any]
) -> list[tuple[Markup, Markup]]:
    """Drawings with their captions."""
    figures = []
    if records:
        figures.append(_histogram(result, records))
    for name, (title, metric, short, y_label) in CURVES.items():
        if name in curves:
            x, y = (np.asarray(axis, dtype=float) for axis in curves[name])
            value = "" if result.get(metric) is None else f"{short} {_percent(result[metric])}%"
            limit = float(x[-1])
            if name == "pro" and limit < 1.0:
                value += f" up to {limit:.0%} false positives"
            caption = Markup("<b>{}</b> {}").format(title, value)
            figures.append((_curve(title, x, y, limit, y_label, name != "pro"), caption))
    return figures


def _histogram(result: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> tuple[Markup, Markup]:
    labels = np.array([bool(record["label"]) for record in records])
    scores = np.array([record["score"] for record in records], dtype=float)
    scores = np.clip(scores, np.finfo(np.float32).min, np.finfo(np.float32).max)  # infinity has no place on an axis
    threshold = result.get("image_threshold")  # None where there is no calibration
    # a few far outliers would leave all others in one bar
    low, high = float(scores.min()), float(np.quantile(scores, 0.98))
    if threshold is not None:
        low, high = min(low, threshold), max(high, threshold)
    high = high if high > low else low + max(abs(low), 1.0)
    num_bars = int(np.clip(np.sqrt(len(scores)) * 2.0, 8, MOST_BARS))
    edges = np.linspace(low, high + (high - low) / num_bars, num_bars + 1)
    counts = {
        kind: np.histogram(np.clip(scores[chosen], None, edges[-1]), edges)[0]
        for kind, chosen in (("good", ~labels), ("defective", labels))
        if chosen.any()
    }
    highest = max(int(count.max()) for count in counts.values())
    frame, to_x, to_y = _axes((edges[0], edges[-1]), (0.0, 1.05 * highest), "anomaly score", "images", whole_y=True)
    x, base = np.repeat(to_x(edges), 2), to_y(np.zeros(1))
    bars = [
        f'<path class="{kind} bars" d="{_path(x, np.concatenate([base, np.repeat(to_y(count), 2), base]))}Z"/>'
        for kind, count in counts.items()
    ]
    caption = Markup("<b>Scores</b> of {} images").format(
        Markup(" and ").join(Markup('<span class="key {0}"></span>{0}').format(kind) for kind in counts)
    )
    if threshold is not None:
        at = float(to_x(np.array(threshold)))
        bars.append(f'<line class="threshold" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{BOTTOM}"/>')
        caption += Markup("; alarm above <b>{:.4g}</b>").format(threshold)
    if scores.max() > edges[-1]:
        caption += Markup("; the last bar holds all above")
    return _drawing("Histogram of anomaly scores", [frame, *bars]), caption


def _curve(title: str, x: np.ndarray, y: np.ndarray, x_limit: float, y_label: str, diagonal: bool) -> Markup:
    frame, to_x, to_y = _axes((0.0, x_limit), (0.0, 1.0), "false-positive rate", y_label)
    parts = [frame]
    if diagonal:
        parts.append(f'<line class="chance" x1="{LEFT}" y1="{BOTTOM}" x2="{RIGHT}" y2="{TOP}"/>')
    parts.append(f'<path class="curve" d="{_path(to_x(x), to_y(y))}"/>')
    return _drawing(title, parts)


def _axes(
    x_range: tuple[float, float], y_range: tuple[float, float], x_label: str, y_label: str, whole_y: bool = False
) -> tuple[str, Any, Any]:
    """Grid, ticks and labels; and the two functions that take values into the view box."""

    def to_x(values: np.ndarray) -> np.ndarray:
        return LEFT + (values - x_range[0]) / (x_range[1] - x_range[0]) * (RIGHT - LEFT)

    def to_y(values: np.ndarray) -> np.ndarray:
        return BOTTOM - (values - y_range[0]) / (y_range[1] - y_range[0]) * (BOTTOM - TOP)

    parts = []
    for tick in _ticks(*x_range):
        at = float(to_x(np.array(tick)))
        parts.append(f'<line class="rule" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{BOTTOM}"/>')
        parts.append(f'<text x="{at:.1f}" y="{BOTTOM + 14}" text-anchor="middle">{tick:g}</text>')
    for tick in _ticks(*y_range, whole=whole_y):
        at = float(to_y(np.array(tick)))
        parts.append(f'<line class="rule" x1="{LEFT}" x2="{RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text x="{LEFT - 5}" y="{at + 4:.1f}" text-anchor="end">{tick:g}</text>')
    middle_x, middle_y = (LEFT + RIGHT) / 2, (TOP + BOTTOM) / 2
    parts.append(f'<text x="{middle_x:g}" y="{HEIGHT - 6}" text-anchor="middle">{x_label}</text>')
    parts.append(f'<text transform="translate(11 {middle_y:g}) rotate(-90)" text-anchor="middle">{y_label}</text>')
    return "".join(parts), to_x, to_y


def _ticks(low: float, high: float, whole: bool = False) -> list[float]:
    ticks = MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10], integer=whole).tick_values(low, high)
    return [round(float(tick), 12) for tick in ticks if low - 1e-9 <= tick <= high + 1e-9]


def _path(x: np.ndarray, y: np.ndarray) -> str:
    """An SVG path through the points, without those that no screen could tell from the one before."""
    points = np.round(np.stack([x, y], axis=1), 1)
    kept = [points[0]]
    for point in points[1:-1]:
        if np.abs(point - kept[-1]).sum() >= 0.5:
            kept.append(point)
    kept.append(points[-1])
    return "M" + "L".join(f"{a:g} {b:g}" for a, b in kept)


def _drawing(title: str, parts: Sequence[str]) -> Markup:
    label = Markup.escape(title)
    return Markup(f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>')


# -- the document ------------------------------------------------------------------------------------------------

_STYLE = """
:root { color-scheme: light dark; --text: #1c2127; --soft: #59636e; --ground: #fff; --raised: #f5f7f9; --line: #dde2e7;
  --good: #2d74a8; --defective: #c93a4b; }
@media (prefers-color-scheme: dark) { :root { --text: #e4e8ec; --soft: #9aa5b1; --ground: #14181d; --raised: #1d232a;
  --line: #333c46; --good: #62b0e8; --defective: #ff7a85; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem clamp(.9rem, 3vw, 2.5rem) 4rem; max-width: 84rem; color: var(--text);
  background: var(--ground); font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial,
  sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: .2rem 0 1rem; }
h2 { font-size: 1.25rem; margin: 2.8rem 0 .4rem; padding-top: 1rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.4rem 0 .5rem; }
a { color: inherit; text-decoration-color: var(--soft); text-underline-offset: .2em; }
dl.setting { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; margin: 0 0 1.6rem;
  font-size: .9rem; }
dl.setting dt, dl.counts dt { color: var(--soft); }
dl.setting dd, dl.counts dd { margin: 0; }
dl.counts { display: flex; flex-wrap: wrap; gap: .2rem 1.6rem; margin: 0 0 1rem; font-size: .9rem; }
dl.counts div { display: flex; gap: .45rem; }
code { font: .85em/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; background: var(--raised);
  padding: .1rem .35rem; border-radius: .3rem; }
.table { overflow-x: auto; border: 1px solid var(--line); border-radius: .5rem; width: fit-content; max-width: 100%; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .85rem; text-align: right; white-space: nowrap; overflow-wrap: normal; }
th:first-child { text-align: left; position: sticky; left: 0; background: var(--ground); }
thead th { color: var(--soft); font-weight: 500; background: var(--raised); }
thead th:first-child { background: var(--raised); }
tbody tr { border-top: 1px solid var(--line); }
tbody th { font-weight: 500; }
tr.mean, tr.mean th { font-weight: 700; }
tr.baseline, tr.baseline th { color: var(--soft); font-weight: 400; }
details { margin: .8rem 0; }
summary { cursor: pointer; color: var(--soft); margin-bottom: .5rem; }
p.note { color: var(--soft); font-size: .85rem; margin: .5rem 0 0; }
.grid { display: grid; gap: 1.1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 17.5rem), 1fr)); }
figure { margin: 0; }
figcaption { font-size: .85rem; line-height: 1.4; color: var(--soft); }
figcaption b { color: var(--text); font-weight: 600; }
svg { display: block; width: 100%; height: auto; }
svg text { font-size: 11px; fill: var(--soft); }
svg .rule { stroke: var(--line); stroke-width: 1; }
svg .curve { fill: none; stroke: var(--good); stroke-width: 2; stroke-linejoin: round; }
svg .chance { stroke: var(--soft); stroke-width: 1; stroke-dasharray: 1 4; stroke-linecap: round; }
svg .bars { fill-opacity: .45; stroke-width: 1.2; stroke-linejoin: round; }
svg .good { fill: var(--good); stroke: var(--good); }
svg .defective { fill: var(--defective); stroke: var(--defective); }
svg .threshold { stroke: var(--text); stroke-width: 1.4; stroke-dasharray: 5 3; }
.key { display: inline-block; width: .75em; height: .75em; margin: 0 .3em 0 .15em; border-radius: .15em; }
.key.good { background: var(--good); }
.key.defective { background: var(--defective); }
img { display: block; width: 100%; height: auto; border-radius: .35rem; margin-bottom: .3rem;
  background: var(--raised); }
@media (max-width: 34rem) { dl.setting { grid-template-columns: 1fr; gap: 0; } dl.setting dd { margin-bottom: .5rem; }
  th, td { padding: .4rem .6rem; } tbody th { white-space: normal; min-width: 8rem; overflow-wrap: anywhere; } }
"""

_TEMPLATE = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
    """\
{% macro table(rows) %}
<div class="table"><table>
<thead><tr><th scope="col">category</th>
{%- for title in columns.values() %}<th scope="col">{{ title }}</th>{% endfor %}</tr></thead>
<tbody>
{% for name, id, row in rows %}
<tr{% if loop.index > num_categories %} class="{{ 'mean' if name == 'mean' else 'baseline' }}"{% endif %}>
<th scope="row">{% if id %}<a href="#{{ id }}">{{ name }}</a>{% else %}{{ name }}{% endif %}</th>
{%- for column in columns %}<td>{{ percent(row.get(column)) or '–' }}</td>{% endfor %}</tr>
{% endfor %}
</tbody>
</table></div>
{% endmacro %}
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<link rel="icon" href="data:,">
<title>{{ title }}</title>
<style>{{ style }}</style>
</head>
<body>
<h1>{{ title }}</h1>
<dl class="setting">
{% for name, value in facts %}
<dt>{{ name }}</dt><dd>{% if name == 'command' %}<code>{{ value }}</code>{% else %}{{ value }}{% endif %}</dd>
{% endfor %}
</dl>
{% if columns %}
{{ table(rows) }}
<p class="note">All in percent.</p>
{% else %}
<p class="note">No metric is defined: that takes good and defective images.</p>
{% endif %}
{% for baseline, baseline_rows in by_category.items() %}
<details><summary>{{ baseline }} by category</summary>
{{ table(baseline_rows) }}
</details>
{% endfor %}
{% for section in sections %}
<section id="{{ section.id }}">
<h2>{{ section.name }}</h2>
<dl class="counts">
{% for name, value in section.facts %}
<div><dt>{{ name }}</dt><dd>{{ value }}</dd></div>
{% endfor %}
</dl>
<div class="grid">
{% for drawing, caption in section.figures %}
<figure>{{ drawing }}<figcaption>{{ caption }}</figcaption></figure>
{% endfor %}
</div>
{% for group, group_cases in section.groups %}
<h3>{{ group }}</h3>
<div class="grid">
{% for case in group_cases %}
<figure><img src="{{ data_uri(case.picture) }}" width="{{ case.picture.shape[1] }}" height="{{ case.picture.shape[0] }}"
 alt="Image and anomaly map: {{ case.caption }}"><figcaption>{{ case.caption }}</figcaption></figure>
{% endfor %}
</div>
{% endfor %}
</section>
{% endfor %}
</body>
</html>
"""
)
