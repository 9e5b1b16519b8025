"""What thresholds promise, over many simulated calibration sets: no network is needed."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from diffad import ScoreCalibration
from diffad.calibration.conformal import conformal_threshold, false_alarm_bound, threshold_rank


def true_rates(num_scores: int, rate: float, sets: int = 4000) -> np.ndarray:
    """The false-alarm rates of thresholds from many sets of standard normal scores."""
    scores = np.sort(np.random.default_rng(0).standard_normal((sets, num_scores)), axis=1)
    thresholds = scores[:, min(threshold_rank(num_scores, rate), num_scores) - 1]
    return np.array([0.5 * math.erfc(threshold / math.sqrt(2.0)) for threshold in thresholds])


@pytest.mark.parametrize(("num_scores", "rate"), [(19, 0.05), (62, 0.05), (100, 0.01), (300, 0.02)])
def test_the_stated_rate_holds_on_average_over_calibration_sets(num_scores, rate):
    mean = true_rates(num_scores, rate).mean()
    assert mean < 1.05 * rate
    assert mean > rate - 1.1 / (num_scores + 1)  # no further below than one image can say


@pytest.mark.parametrize(("num_scores", "rate"), [(19, 0.05), (62, 0.05), (100, 0.01), (300, 0.02)])
@pytest.mark.parametrize("confidence", [0.9, 0.95])
def test_the_bound_holds_for_that_share_of_calibration_sets(num_scores, rate, confidence):
    bound = false_alarm_bound(num_scores, rate, confidence)
    kept = (true_rates(num_scores, rate) <= bound).mean()
    assert abs(kept - confidence) < 0.015  # 4,000 sets: three deviations


def test_the_bound_for_62_images_at_5_percent():
    assert round(false_alarm_bound(62, 0.05), 3) == 0.098
    assert false_alarm_bound(10_000, 0.05) < 0.054  # many images come close to the rate itself
    assert false_alarm_bound(5, 0.01) > 1.0 / 6.0  # fewer cannot vouch for it
    with pytest.raises(ValueError, match="`num_scores` must be at least 1"):
        false_alarm_bound(0, 0.05)


def test_the_threshold_is_the_score_of_that_rank():
    scores = torch.randn(62, generator=torch.Generator().manual_seed(0)).sort().values
    assert threshold_rank(62, 0.05) == 60
    assert conformal_threshold(scores, 0.05) == float(scores[59])


def test_a_calibration_states_the_bound_of_its_own_images():
    calibration = ScoreCalibration(num_categories=2, num_scores=62, false_alarm_rate=0.05)
    calibration.set_thresholds(0, torch.randn(62), torch.randn(62))
    calibration.set_thresholds(1, torch.randn(40), torch.randn(40))
    assert calibration.false_alarm_bound(0) == false_alarm_bound(62, 0.05)
    assert calibration.false_alarm_bound(1) == false_alarm_bound(40, 0.05)
