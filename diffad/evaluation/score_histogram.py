"""Histograms of scores, exact until their bins run out, and the metrics that follow from them.

All pixel metrics follow from a few histograms over the score: of all pixels, of defective pixels, of defective pixels
weighted by one over the area of their connected region, and so on (`ALL` to `SATURATED`). A bin is one float32 score,
or, once there are more distinct scores than bins, one value of its upper bits. So no range is needed in advance,
results are exact until the bins run out, and bins are relative afterwards: with the default 2^18, about one part in ten
thousand. How many bits are dropped follows from the set of pixels alone: neither order, nor batching, nor the split
over processes changes a result.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy import integrate

_CURVE_POINTS = 500

# Rows of `Histogram.counts`. Of defective pixels, each counts one over ...
ALL = 0
DEFECTIVE = 1  # one
PER_REGION = 2  # the area of its connected region
PER_IMAGE = 3  # the defective area of its image
GOOD = 4  # (pixels of images without a defect, each one)
SATURATED = 5  # the area from which on its defect is found in full; only as many as that, the highest, count at all
NUM_ROWS = 6


class Histogram(NamedTuple):
    """Counts for each distinct score, in order of the score. Only scores that occur are held."""

    keys: np.ndarray  # (B,) int32, increasing; see `_score_keys`, without the lowest `dropped_bits` bits
    counts: np.ndarray  # (NUM_ROWS, B) float64; of images' scores, `ALL` and `DEFECTIVE` alone
    dropped_bits: int


EMPTY = Histogram(np.zeros(0, np.int32), np.zeros((NUM_ROWS, 0)), 0)


def _score_keys(scores: np.ndarray) -> np.ndarray:
    """Float32 scores to int32 in the same order: a float's bits, all but the sign flipped below zero."""
    keys = (scores + np.float32(0.0)).view(np.int32)  # the sum makes -0.0 the same score as 0.0
    keys ^= (keys >> 31) & 0x7FFFFFFF
    return keys


def _is_first(keys: np.ndarray) -> np.ndarray:
    """True where a run of equal values begins, for sorted `keys`, which may be empty."""
    return np.concatenate((keys[:1] == keys[:1], keys[1:] != keys[:-1]))


def _distinct(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct keys in order, and how often each occurs. May reorder `keys`."""
    if not keys.size:
        return keys, np.zeros(0, np.int64)
    lowest = keys.min()
    if int(keys.max()) - int(lowest) < min(8 * len(keys), 2**23):  # once bits are dropped; sorting is slower
        counts = np.bincount(keys - lowest)
        occurring = np.flatnonzero(counts)
        return occurring.astype(np.int32) + lowest, counts[occurring]
    keys.sort()
    starts = np.flatnonzero(_is_first(keys))
    return keys[starts], np.diff(starts, append=len(keys))


def _num_bits_to_drop(keys: np.ndarray, num_bins: int | None) -> int:
    """The fewest bits to drop from distinct sorted `keys` that leave at most `num_bins` of them."""
    if num_bins is None or len(keys) <= num_bins:
        return 0
    differing = (keys[1:] ^ keys[:-1]).view(np.uint32)
    num_bits = 1
    while np.count_nonzero(differing >= 1 << num_bits) >= num_bins:
        num_bits += 1
    return num_bits


def count_scores(
    scores: np.ndarray,
    rows: Sequence[tuple[np.ndarray, np.ndarray | None]],
    dropped_bits: int = 0,
    num_bins: int | None = None,
) -> Histogram:
    """The histogram of float32 scores.

    Args:
        scores: of all.
        rows: behind that of all scores, those of some: their scores, which stand in `scores` too, and each one's
            weight, float64; None for one each.
        dropped_bits: of the scores' lowest.
        num_bins: at most so many bins; more bits are dropped for it. None: no more are.
    """
    keys = _score_keys(scores)
    keys >>= dropped_bits
    distinct, totals = _distinct(keys)
    extra_bits = _num_bits_to_drop(distinct, num_bins)
    if extra_bits:
        dropped_bits += extra_bits
        distinct >>= extra_bits
        starts = np.flatnonzero(_is_first(distinct))
        distinct, totals = distinct[starts], np.add.reduceat(totals, starts)
    counts = [totals]
    for some, weights in rows:
        positions = np.searchsorted(distinct, _score_keys(some) >> dropped_bits)
        counts.append(np.bincount(positions, weights, minlength=len(distinct)))
    return Histogram(distinct, np.stack(counts), dropped_bits)


def merge(histograms: Sequence[Histogram], num_bins: int) -> Histogram:
    """The histogram of all pixels together, of at most `num_bins` bins."""
    dropped_bits = max(one.dropped_bits for one in histograms)
    keys = np.concatenate([one.keys >> (dropped_bits - one.dropped_bits) for one in histograms])
    order = np.argsort(keys, kind="stable")  # linear here: it merges runs that are sorted already
    keys = keys[order]
    extra_bits = _num_bits_to_drop(keys[_is_first(keys)], num_bins)
    keys >>= extra_bits
    is_first = _is_first(keys)
    positions = np.empty_like(order)
    positions[order] = np.cumsum(is_first) - 1
    counts = np.concatenate([one.counts for one in histograms], axis=1)
    counts = np.stack([np.bincount(positions, row) for row in counts])  # (NUM_ROWS, B)
    return Histogram(keys[is_first], counts, dropped_bits + extra_bits)


def pack(histogram: Histogram, num_bins: int) -> torch.Tensor:
    """A histogram as one tensor of fixed shape for torchmetrics, (1 + NUM_ROWS, num_bins + 1) float64.

    The first column holds the dropped bits; the others a key and its counts each, zero where unused.
    """
    packed = np.zeros((1 + NUM_ROWS, num_bins + 1))
    packed[0, 0] = histogram.dropped_bits
    packed[0, 1 : len(histogram.keys) + 1] = histogram.keys
    packed[1:, 1 : len(histogram.keys) + 1] = histogram.counts
    return torch.from_numpy(packed)


def unpack(packed: torch.Tensor) -> Histogram:
    values = packed.numpy(force=True)
    num_used = 1 + np.count_nonzero(values[1, 1:])
    return Histogram(values[0, 1:num_used].astype(np.int32), values[1:, 1:num_used], int(values[0, 0]))


def merge_packed(packed: torch.Tensor) -> torch.Tensor:
    """(processes, 1 + NUM_ROWS, num_bins + 1) to (1 + NUM_ROWS, num_bins + 1)."""
    num_bins = packed.shape[-1] - 1
    return pack(merge([unpack(one) for one in packed], num_bins), num_bins).to(packed.device)


def is_ranked(histogram: Histogram) -> bool:
    """Whether there are both normal and defective scores."""
    total, defective = histogram.counts[[ALL, DEFECTIVE]].sum(axis=1)
    return 0 < defective < total


def curve(histogram: Histogram, row: int = DEFECTIVE) -> tuple[np.ndarray, np.ndarray]:
    """False-positive rate, and what share of a row is found, as the threshold falls.

    Of `DEFECTIVE` that is the true-positive rate, of `PER_REGION` and `SATURATED` the mean overlap with the defects.
    """
    total, defective, found = histogram.counts[[ALL, DEFECTIVE, row], ::-1]
    false_positives = np.concatenate(([0.0], np.cumsum(total - defective)))
    positives = np.concatenate(([0.0], np.cumsum(found)))
    return false_positives / false_positives[-1], positives / positives[-1]


def ranking_metrics(histogram: Histogram) -> tuple[float, float, float]:
    """AUROC, AP and F1-max; NaN without both classes."""
    if not is_ranked(histogram):
        return math.nan, math.nan, math.nan
    fpr, tpr = curve(histogram)
    auroc = integrate.trapezoid(tpr, fpr)  # ties get half, as in the Mann-Whitney statistic
    total, defective = histogram.counts[[ALL, DEFECTIVE], ::-1]
    true_positives, predicted = np.cumsum(defective), np.cumsum(total)
    ap = np.sum(defective * (true_positives / predicted)) / true_positives[-1]
    f1max = np.max(2.0 * true_positives / (predicted + true_positives[-1]))
    # rounding of long sums can pass 1 by a few units in the last place
    return min(float(auroc), 1.0), min(float(ap), 1.0), float(f1max)


def up_to(limit: float, fpr: np.ndarray, overlap: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The part of a curve up to a false-positive rate, its last point linearly interpolated."""
    inside = int(np.searchsorted(fpr, limit, side="right"))
    if inside == len(fpr):
        return fpr, overlap
    step = (limit - fpr[inside - 1]) / (fpr[inside] - fpr[inside - 1])
    last = overlap[inside - 1] + step * (overlap[inside] - overlap[inside - 1])
    return np.append(fpr[:inside], limit), np.append(overlap[:inside], last)


def per_region_overlap(histogram: Histogram, fpr_limit: float, row: int = PER_REGION) -> float:
    """Mean overlap with the defects, averaged over false-positive rates from 0 to the limit.

    Args:
        histogram: of pixels.
        fpr_limit: in (0, 1].
        row: `PER_REGION` for PRO, `SATURATED` for sPRO.
    """
    if not is_ranked(histogram):
        return math.nan
    fpr, overlap = up_to(fpr_limit, *curve(histogram, row))
    return min(float(integrate.trapezoid(overlap, fpr)) / fpr_limit, 1.0)


def per_image_overlap(histogram: Histogram, bounds: tuple[float, float]) -> float:
    """AUPIMO: each image's share of defective pixels that is found, averaged over false-positive rates and images.

    Rates are those of all good images' pixels together (the paper's mean over images, where all are of one size), and
    averaged over by their logarithm. A pixel is found at all rates from that of its own score on: so it counts the
    share of the logarithmic range that lies above, and no curve of an image need be kept (Bertoldo et al., "AUPIMO:
    Redefining Visual Anomaly Detection Benchmarks with High Speed and Low Tolerance", BMVC 2024, section 3).

    Args:
        histogram: of pixels.
        bounds: of the rates, 0 < lower < upper <= 1.

    Returns:
        In [0, 1]; NaN without good images or without defects.
    """
    per_image, good = histogram.counts[[PER_IMAGE, GOOD], ::-1]
    if not good.sum() or not per_image.sum():
        return math.nan
    low, high = np.log(bounds)
    rates = np.clip(np.cumsum(good) / good.sum(), *bounds)  # at the threshold of each bin
    found = per_image * (high - np.log(rates)) / (high - low)
    return min(float(found.sum() / per_image.sum()), 1.0)


def thin(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most `_CURVE_POINTS` of a non-decreasing curve's points, evenly spaced along it; its ends stay."""
    length = x / x[-1] + y
    kept = np.unique(np.searchsorted(length, np.linspace(0.0, length[-1], _CURVE_POINTS)))
    return x[kept], y[kept]
