"""Histograms of scores, exact until their bins run out, and the metrics that follow from them.

All pixel metrics follow from three histograms over the score: all pixels, defective pixels, and defective
pixels weighted by one over the area of their connected region. A bin is one float32 score, or, once there are
more distinct scores than bins, one value of its upper bits. So no range is needed in advance, results are
exact until the bins run out, and bins are relative afterwards: with the default 2^18, about one part in ten
thousand. How many bits are dropped follows from the set of pixels alone: neither order, nor batching, nor the
split over processes changes a result.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy import integrate

_CURVE_POINTS = 500


class Histogram(NamedTuple):
    """Counts for each distinct score, in order of the score. Only scores that occur are held."""

    keys: np.ndarray  # (B,) int32, increasing; see `_score_keys`, without the lowest `dropped_bits` bits
    counts: np.ndarray  # (3, B) float64: all; defective; defective, each over its region's area
    dropped_bits: int


EMPTY = Histogram(np.zeros(0, np.int32), np.zeros((3, 0)), 0)


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
    defective_scores: np.ndarray,
    region_areas: np.ndarray,
    dropped_bits: int = 0,
    num_bins: int | None = None,
) -> Histogram:
    """The histogram of float32 scores; the defective ones stand in `scores` too. No `num_bins`: no bits are dropped."""
    keys = _score_keys(scores)
    keys >>= dropped_bits
    distinct, totals = _distinct(keys)
    extra_bits = _num_bits_to_drop(distinct, num_bins)
    if extra_bits:
        dropped_bits += extra_bits
        distinct >>= extra_bits
        starts = np.flatnonzero(_is_first(distinct))
        distinct, totals = distinct[starts], np.add.reduceat(totals, starts)
    positions = np.searchsorted(distinct, _score_keys(defective_scores) >> dropped_bits)
    defective = np.bincount(positions, minlength=len(distinct))
    per_region = np.bincount(positions, 1.0 / region_areas.astype(np.float64), minlength=len(distinct))
    return Histogram(distinct, np.stack((totals, defective, per_region)), dropped_bits)


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
    counts = np.stack([np.bincount(positions, row) for row in counts])  # (3, B)
    return Histogram(keys[is_first], counts, dropped_bits + extra_bits)


def pack(histogram: Histogram, num_bins: int) -> torch.Tensor:
    """A histogram as one tensor of fixed shape for torchmetrics, (4, num_bins + 1) float64.

    The first column holds the dropped bits; the others a key and its three counts each, zero where unused.
    """
    packed = np.zeros((4, num_bins + 1))
    packed[0, 0] = histogram.dropped_bits
    packed[0, 1 : len(histogram.keys) + 1] = histogram.keys
    packed[1:, 1 : len(histogram.keys) + 1] = histogram.counts
    return torch.from_numpy(packed)


def unpack(packed: torch.Tensor) -> Histogram:
    values = packed.numpy(force=True)
    num_used = 1 + np.count_nonzero(values[1, 1:])
    return Histogram(values[0, 1:num_used].astype(np.int32), values[1:, 1:num_used], int(values[0, 0]))


def merge_packed(packed: torch.Tensor) -> torch.Tensor:
    """(processes, 4, num_bins + 1) to (4, num_bins + 1)."""
    num_bins = packed.shape[-1] - 1
    return pack(merge([unpack(one) for one in packed], num_bins), num_bins).to(packed.device)


def is_ranked(histogram: Histogram) -> bool:
    """Whether there are both normal and defective scores."""
    total, defective, _ = histogram.counts.sum(axis=1)
    return 0 < defective < total


def curve(histogram: Histogram, overlap: bool) -> tuple[np.ndarray, np.ndarray]:
    """False-positive rate, and true-positive rate or per-region overlap, as the threshold falls."""
    total, defective, per_region = histogram.counts[:, ::-1]
    false_positives = np.concatenate(([0.0], np.cumsum(total - defective)))
    positives = np.concatenate(([0.0], np.cumsum(per_region if overlap else defective)))
    return false_positives / false_positives[-1], positives / positives[-1]


def ranking_metrics(histogram: Histogram) -> tuple[float, float, float]:
    """AUROC, AP and F1-max; NaN without both classes."""
    if not is_ranked(histogram):
        return math.nan, math.nan, math.nan
    fpr, tpr = curve(histogram, overlap=False)
    auroc = integrate.trapezoid(tpr, fpr)  # ties get half, as in the Mann-Whitney statistic
    total, defective, _ = histogram.counts[:, ::-1]
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


def per_region_overlap(histogram: Histogram, fpr_limit: float) -> float:
    """Mean overlap with the defective regions, averaged over false-positive rates from 0 to the limit."""
    if not is_ranked(histogram):
        return math.nan
    fpr, overlap = up_to(fpr_limit, *curve(histogram, overlap=True))
    return min(float(integrate.trapezoid(overlap, fpr)) / fpr_limit, 1.0)


def thin(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most `_CURVE_POINTS` of a non-decreasing curve's points, evenly spaced along it; its ends stay."""
    length = x / x[-1] + y
    kept = np.unique(np.searchsorted(length, np.linspace(0.0, length[-1], _CURVE_POINTS)))
    return x[kept], y[kept]
