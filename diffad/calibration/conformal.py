"""Conformal thresholds (Vovk et al., "Algorithmic Learning in a Random World", 2005), for any distribution."""

from __future__ import annotations

import math
import warnings

import torch


def conformal_threshold(sorted_scores: torch.Tensor, false_alarm_rate: float) -> float:
    """The score above which at most `false_alarm_rate` of good images fall (split conformal).

    Args:
        sorted_scores: scores of good images that no statistic was computed from, (n,), ascending.
        false_alarm_rate: in (0, 1). n images can vouch for no less than 1 / (n + 1).

    Returns:
        The k-th smallest score, k = ceil((n + 1)(1 - rate)); the largest, with a warning, where k is above n.
    """
    if not 0.0 < false_alarm_rate < 1.0:
        raise ValueError(f"`false_alarm_rate` must lie in (0, 1), but is {false_alarm_rate}.")
    count = sorted_scores.numel()
    rank = math.ceil((count + 1) * (1.0 - false_alarm_rate) - 1e-9)
    if rank > count:
        warnings.warn(
            f"{count} good images cannot vouch for a false-alarm rate of {false_alarm_rate:g}: the threshold is their "
            f"largest score, which holds {1.0 / (count + 1):.2g}. Calibrate with at least "
            f"{math.ceil(1.0 / false_alarm_rate) - 1} held-out good images.",
            stacklevel=2,
        )
        rank = count
    return float(sorted_scores[rank - 1])
