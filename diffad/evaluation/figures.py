"""Curves and histograms as SVG, whose colours are the page's own, so that they follow its light and its dark scheme."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.ticker import MaxNLocator

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


def draw_figures(
    result: Mapping[str, Any], records: Sequence[Mapping[str, Any]], curves: Mapping[str, Any]
) -> list[tuple[Markup, Markup]]:
    """Drawings with their captions."""
    figures = []
    if records:
        figures.append(_histogram(result, records))
    for name, (title, metric, short, y_label) in CURVES.items():
        if name in curves:
            x, y = (np.asarray(axis, dtype=float) for axis in curves[name])
            value = "" if result.get(metric) is None else f"{short} {percent(result[metric])}%"
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


def percent(value: float | None) -> str:
    return "" if value is None else f"{100.0 * value:.1f}"
