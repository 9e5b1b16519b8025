"""The drift test: its bound, what it notices, and that left-out parts change nothing."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from diffad.calibration.drift import ALARM_BETS, RANK_BETS, DriftTest, bet, may_bet_on_alarms, paid_after, reserve_after


def stream(test: DriftTest, scores) -> list[float]:
    return [test.update(score).total for score in scores]


def test_capital_is_a_martingale():
    """With the reserve, the mean over uniform values is what it was; of alarms, where every other part alarms."""
    middles = (np.arange(1000) + 0.5) / 1000
    for bets, values in ((RANK_BETS, middles), (ALARM_BETS, np.array([0.0, 1.0]))):
        capital = np.full(len(bets), 0.7)
        after = bet(np.broadcast_to(capital, (len(values), len(bets))), bets, values, paid_after(5)).sum(axis=1)
        assert after.mean() + reserve_after(6) == pytest.approx(capital.sum() + reserve_after(5), rel=1e-12)
    assert reserve_after(0) == 1.0


def test_good_parts_alarm_no_more_often_than_stated():
    """Chance 10%, so that 200 short streams say something: 20 are expected at most, 33 are three deviations above."""
    alarms = 0
    for seed in range(200):
        scores = np.random.default_rng(seed).lognormal(size=320).round(1)  # many are equal
        test = DriftTest(scores[:20], 0.1, chance=0.1, seed=seed)
        stream(test, scores[20:])
        alarms += test.drifted_at is not None
    assert alarms <= 33


def test_a_calibration_whose_images_were_left_out_alarms_no_more_often_than_stated():
    """Its scores are higher than new parts' by 0.25 deviations; of 100 images 0.17 was found at most."""
    alarms = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        test = DriftTest(rng.normal(0.25, size=100), 0.1, chance=0.1, seed=seed)
        stream(test, rng.normal(size=1000))
        alarms += test.drifted_at is not None
    assert alarms <= 4  # 10%; it would be ten of them if bets on lower scores did not pay


def test_p_values_of_good_parts_are_uniform_also_where_scores_are_equal():
    found = []
    for seed in range(40):
        scores = np.random.default_rng(seed).integers(0, 6, 120)
        test = DriftTest(scores[:30], 0.1, seed=seed)
        found += [p for score in scores[30:] if (p := test.update(score).p_value) is not None]
    assert len(found) > 2000
    assert stats.kstest(found, "uniform").pvalue > 0.001


@pytest.mark.parametrize(("shift", "direction"), [(1.0, "higher"), (-1.0, "lower"), (9.0, "alarms")])
def test_a_change_is_noticed_and_where_it_began(shift, direction):
    rng = np.random.default_rng(3)
    test = DriftTest(rng.normal(size=200), 0.01)
    stream(test, rng.normal(size=500))
    assert test.drifted_at is None
    stream(test, rng.normal(shift, size=100))
    assert 501 <= test.drifted_at <= 600
    assert abs(test.began_at - 501) <= 25
    assert test.direction == direction
    before = test.drifted_at
    assert np.isfinite(stream(test, rng.normal(shift, size=3000))).all()
    assert test.drifted_at == before  # it stays


def test_defects_that_alarm_leave_the_ranks_as_they_are():
    rng = np.random.default_rng(0)
    calibration, good = rng.normal(size=100), rng.normal(size=200).clip(max=2.0)
    plain, mixed = DriftTest(calibration, 0.01), DriftTest(calibration, 0.01)
    stream(plain, good)
    for i, score in enumerate(good):
        mixed.update(score)
        if i % 10 == 0:
            mixed.update(50.0)
    assert mixed.num_left_out == 20 + plain.num_left_out
    assert np.array_equal(mixed.of_ranks, plain.of_ranks)
    assert mixed.drifted_at is None


def test_equal_scores_that_raise_no_alarm_are_no_drift():
    test = DriftTest([1.5] * 20, 0.1)
    stream(test, [1.5] * 300)
    assert test.drifted_at is None
    stream(test, [1.6] * 60)
    assert test.direction == "alarms"


def test_ranks_are_those_that_are_written_down():
    """A test that begins with a table's six digits ends where the one that saw all digits did."""
    rng = np.random.default_rng(1)
    calibration, scores = rng.normal(size=50), rng.normal(size=100)
    first, again = DriftTest(calibration, 0.05), DriftTest([float(f"{x:.6g}") for x in calibration], 0.05)
    assert stream(first, scores) == stream(again, [float(f"{x:.6g}") for x in scores])


def test_without_a_calibration_parts_are_ranked_among_themselves():
    rng = np.random.default_rng(2)
    test = DriftTest([], 0.01)
    stream(test, rng.normal(size=300))
    assert test.drifted_at is None
    stream(test, rng.normal(2.0, size=60))
    assert test.direction == "higher"
    with pytest.raises(ValueError, match=r"`chance` must lie in \(0, 1\)"):
        DriftTest([], 0.01, chance=1.0)


def test_alarms_of_a_threshold_that_few_images_set_are_no_drift():
    """Of the largest of three scores a good part may alarm more often than not: in one of eight models."""
    few, enough = DriftTest([1.0, 2.0, 3.0], 0.1), DriftTest(np.arange(10.0), 0.1)
    for test in (few, enough):
        stream(test, [99.0] * 200)
    assert few.drifted_at is None
    assert enough.direction == "alarms"
    assert not may_bet_on_alarms(29, 24, 0.01)  # a rate of 20%
    assert may_bet_on_alarms(40, 33, 0.01)
