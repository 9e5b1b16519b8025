"""Conformal thresholds (Vovk et al., "Algorithmic Learning in a Random World", 2005), for any distribution."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

# Share by which one image's score may differ from call to call, by the order of float32 sums. Thresholds stand above
# their score by as much, so that the image which set them raises no alarm.
ROUNDING = 5e-6


def conformal_threshold(sorted_scores: Sequence[float], false_alarm_rate: float) -> float:
    """The score above which at most `false_alarm_rate` of good images fall (split conformal).

    Args:
        sorted_scores: scores of good images that no statistic was computed from, (n,), ascending.
        false_alarm_rate: in (0, 1). n images can vouch for no less than 1 / (n + 1).

    Returns:
        The k-th smallest score, k = ceil((n + 1)(1 - rate)); the largest, with a warning, where k is above n.
    """
    if not 0.0 < false_alarm_rate < 1.0:
        raise ValueError(f"`false_alarm_rate` must lie in (0, 1), but is {false_alarm_rate}.")
    count = len(sorted_scores)
    if threshold_rank(count, false_alarm_rate) > count:
        warnings.warn(
            f"{count} good images cannot vouch for a false-alarm rate of {false_alarm_rate:g}: the threshold is their "
            f"largest score, which holds {1.0 / (count + 1):.2g}. Calibrate with at least "
            f"{math.ceil(1.0 / false_alarm_rate) - 1} such images.",
            stacklevel=2,
        )
    rank = min(threshold_rank(count, false_alarm_rate), count)
    return float(sorted_scores[rank - 1])


def rounded_up(threshold: float) -> float:
    """A threshold that stands above its score by `ROUNDING`."""
    return threshold + ROUNDING * abs(threshold)


def thresholds_at(
    scores: Sequence[float], maxima: Sequence[float] | None, pixel_threshold: float, false_alarm_rate: float
) -> tuple[float, float]:
    """The thresholds of scores and of pixels at a false-alarm rate.

    Args:
        scores: of held-out good images, ascending.
        maxima: of their maps, likewise; None where they are not known, and the pixels' threshold stays.
        pixel_threshold: as it is.
        false_alarm_rate: in (0, 1). One that they cannot vouch for takes the largest.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        of_scores = rounded_up(conformal_threshold(scores, false_alarm_rate))
        if maxima is None:
            return of_scores, pixel_threshold
        return of_scores, rounded_up(conformal_threshold(maxima, false_alarm_rate))


def threshold_rank(num_scores: int, false_alarm_rate: float) -> int:
    """Which of n ascending scores is the threshold: k = ceil((n + 1)(1 - rate)), n + 1 where n cannot vouch for it."""
    return math.ceil((num_scores + 1) * (1.0 - false_alarm_rate) - 1e-9)


def false_alarm_bound(num_scores: int, false_alarm_rate: float, confidence: float = 0.95) -> float:
    """The false-alarm rate that a model of n calibration images keeps with a given confidence.

    The stated rate holds on average over calibration sets. One set's own rate, the share of all good images above its
    k-th smallest of n scores, is distributed as Beta(n + 1 - k, k) where no two scores are equal (Vovk, "Conditional
    validity of inductive conformal predictors", 2012), and lies below where some are.

    Args:
        num_scores: n, the good images that the threshold comes from.
        false_alarm_rate: as the threshold was set, in (0, 1).
        confidence: in (0, 1).

    Returns:
        The quantile of that distribution: 0.098 for 62 images, a rate of 0.05 and a confidence of 0.95.

    Raises:
        ValueError: there are no images.
    """
    if num_scores < 1:
        raise ValueError("`num_scores` must be at least 1: without good images there is no threshold.")
    from scipy.special import betaincinv  # an exported model runs without SciPy

    rank = min(threshold_rank(num_scores, false_alarm_rate), num_scores)
    return float(betaincinv(num_scores + 1 - rank, rank, confidence))
