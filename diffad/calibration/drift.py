"""Whether the world is still as it was calibrated: a conformal test martingale over the scores of parts.

Each part is ranked among the calibration's scores and all earlier parts, ties at random. As long as they all are draws
from one distribution, whatever it is, these online conformal p-values are independent and uniform (Vovk et al.,
"Algorithmic Learning in a Random World", 2005, theorem 2.8), so capital that bets against them is a martingale, and
reaches 1 / c with probability c at most, ever (Ville's inequality). Ranked among the calibration's scores alone,
p-values depend on each other through them, and the bound fails.

The bets are the Simple Jumper's (Vovk, Petej, Nouretdinov, Ahlberg, Carlsson and Gammerman, "Retrain or not retrain:
conformal test martingales for change-point detection", 2021, algorithm 1). Over many good parts its capital melts away,
and a late change would find none to bet with. So a new jumper starts with every part, paid from a reserve: a mixture
over the starting points, and a martingale as each of them is.

Bets on falling scores pay a little with every part beside that, so the capital is a supermartingale, for which the
inequality holds as well. Scores of images that were each left out in turn are a little above a new part's; that pays
for it.
"""

from __future__ import annotations

import math
from array import array
from bisect import bisect_left, bisect_right, insort
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from diffad.calibration.conformal import threshold_rank

JUMPING_RATE = 0.01  # J: the share of the capital that is spread anew over the bets, as in the paper
RANK_BETS = np.array([-1.0, 0.0, 1.0])  # epsilon: on scores that rise, on none, on scores that fall
ALARM_BETS = np.array([1.0])  # on more alarms than other parts
# By so much, over the number of scores that a part is ranked among, the mean p-value of good parts may exceed 1/2:
# where the calibration's images were each left out in turn, they score a little higher than new ones (docs/method.md).
LEFT_OUT_ALLOWANCE = 5.0
NEGLIGIBLE = 0.1  # share of the chance of a false drift alarm that bets on alarms may add where images are few
LARGEST_CAPITAL = 1e100  # far above what any alarm takes; without an end it would overflow


def reserve_after(count: int) -> float:
    """What has not been bet after `count` parts, of a capital of 1: it falls so slowly that no part is too late."""
    return 1.0 / math.log(math.e + count)


def paid_after(count: int) -> float:
    """What the reserve pays to the jumper that starts after `count` parts."""
    return reserve_after(count) - reserve_after(count + 1)


def allowance_among(count: np.ndarray | int) -> np.ndarray:
    """What a part's p-value among `count` scores may be above 1/2 in the mean while nothing has changed."""
    return np.minimum(0.5, LEFT_OUT_ALLOWANCE / (np.asarray(count) + 1.0))


def bet(
    capital: np.ndarray,
    bets: np.ndarray,
    value: np.ndarray | float,
    paid: np.ndarray | float,
    allowance: np.ndarray | float = 0.0,
) -> np.ndarray:
    """One round of the jumpers.

    Args:
        capital: (..., E), on each of the bets.
        bets: (E,), epsilon in [-1, 1].
        value: (...) in [0, 1]; uniform, or of mean 1/2, as long as nothing has changed.
        paid: (...), to the jumper that starts now.
        allowance: (...), what bets on larger values pay for in any case.

    Returns:
        (..., E): each is multiplied by 1 + epsilon (value - 1/2), less epsilon times the allowance where epsilon is
        above 0.
    """
    spread = (JUMPING_RATE * capital.sum(axis=-1, keepdims=True) + np.asarray(paid)[..., None]) / len(bets)
    factor = 1.0 + bets * (np.asarray(value)[..., None] - 0.5)
    factor = factor - np.maximum(bets, 0.0) * np.asarray(allowance)[..., None]
    return np.minimum(((1.0 - JUMPING_RATE) * capital + spread) * factor, LARGEST_CAPITAL)


def may_bet_on_alarms(count: int, rank: int, chance: float) -> bool:
    """Whether the threshold's true rate of false alarms is at most 1/2, as bets on alarms take it to be.

    The rate is known by chance alone: of the `rank`-th smallest of `count` scores it is Beta(count - rank + 1, rank).
    Above 1/2 it is as often as `count` coins show `count - rank` heads at most. Chernoff's bound (1952) on that must be
    below `NEGLIGIBLE` of `chance`.
    """
    beyond = (count - rank) / max(count, 1)
    if not count or beyond >= 0.5:
        return False
    entropy = -sum(p * math.log(p) for p in (beyond, 1.0 - beyond) if p)
    return count * (math.log(2.0) - entropy) >= -math.log(NEGLIGIBLE * chance)


def shown_score(score: float) -> float:
    """A score in the digits that `scores.csv` has: calibration and parts must be rounded alike to be ranked."""
    return float(f"{score:.6g}")


class Evidence(NamedTuple):
    """What one part has added.

    total: the mean of the two capitals; 1 at the start.
    of_ranks, of_alarms: these.
    p_value: of the part, online; None where it was left out.
    """

    total: float
    of_ranks: float
    of_alarms: float
    p_value: float | None


class DriftTest:
    """A test martingale over a stream of parts, most of them good.

    A part that scores at or above the calibration score which is the alarm threshold is left out of the ranks, and so
    are the calibration's scores from there on: what remains of both has one distribution, that of good parts below the
    threshold, and the bound holds to the letter. Defects that raise an alarm thus never count; those that raise none
    do.

    A change that makes every part alarm would leave nothing to rank. So half of the capital bets on more alarms than
    other parts, which no line shows that is as it was calibrated. Where so few images set the threshold that one may,
    that half does not bet (`may_bet_on_alarms`).

    Memory: 8 bytes for each part that is ranked, 8 MB for a million, whose ranking takes about 0.1 ms each.

    Args:
        normal_scores: of the calibration's held-out good images, (n,), in any order; there may be none.
        false_alarm_rate: at which the threshold was set.
        chance: of ever raising an alarm of drift while nothing has changed, in (0, 1).
        seed: of the order of equal scores.

    Attributes:
        num_parts: seen so far.
        num_left_out: of them, those at or above the threshold.
        drifted_at: number of the part, from 1 on, at which the evidence reached 1 / `chance`; None before.
        began_at: about where the change began: the part after which the evidence has only grown, on the whole. None as
            long as `drifted_at` is.
        direction: "higher", "lower" or "alarms", what most of the evidence is of; None likewise.

    Example:
        >>> test = DriftTest([0.1, 0.5, 0.9, 0.3], false_alarm_rate=0.2)
        >>> test.update(0.4).total < 100.0
        True
    """

    def __init__(self, normal_scores: Sequence[float], false_alarm_rate: float, chance: float = 0.01, seed: int = 0):
        if not 0.0 < chance < 1.0:
            raise ValueError(f"`chance` must lie in (0, 1), but is {chance}.")
        ordered = sorted(shown_score(score) for score in normal_scores)
        rank = min(threshold_rank(len(ordered), false_alarm_rate), len(ordered))
        self.threshold = ordered[rank - 1] if ordered else math.inf
        self.ranked = array("d", ordered[: bisect_left(ordered, self.threshold)])
        self.chance = chance
        self.alarm_bets = ALARM_BETS if may_bet_on_alarms(len(ordered), rank, chance) else 0.0 * ALARM_BETS
        self.random = np.random.default_rng(seed)
        self.of_ranks, self.of_alarms = np.zeros(len(RANK_BETS)), np.zeros(len(ALARM_BETS))
        self.num_parts = self.num_left_out = 0
        self.drifted_at: int | None = None
        self.began_at: int | None = None
        self.direction: str | None = None
        self._lowest, self._lowest_at = 1.0, 0  # of the evidence, and after which part

    def update(self, score: float) -> Evidence:
        """Takes in the next part's score."""
        score = shown_score(score)
        is_left_out = score >= self.threshold
        is_alarm = score > self.threshold  # of equal scores all may lie at the threshold, and raise none
        self.of_alarms = bet(self.of_alarms, self.alarm_bets, float(is_alarm), paid_after(self.num_parts))
        p_value = None
        if is_left_out:
            self.num_left_out += 1
        else:
            p_value = self._p_value(score)
            paid = paid_after(self.num_parts - self.num_left_out)
            self.of_ranks = bet(self.of_ranks, RANK_BETS, p_value, paid, allowance_among(len(self.ranked)))
            insort(self.ranked, score)
        self.num_parts += 1
        evidence = self._evidence(p_value)
        if self.drifted_at is None:
            self._look(evidence)
        return evidence

    def _p_value(self, score: float) -> float:
        """(#{earlier > score} + U (#{earlier = score} + 1)) / (#earlier + 1), U uniform."""
        above = len(self.ranked) - (until := bisect_right(self.ranked, score))
        equal = until - bisect_left(self.ranked, score)
        return (above + float(self.random.random()) * (equal + 1)) / (len(self.ranked) + 1)

    def _evidence(self, p_value: float | None) -> Evidence:
        of_ranks = float(self.of_ranks.sum()) + reserve_after(self.num_parts - self.num_left_out)
        of_alarms = float(self.of_alarms.sum()) + reserve_after(self.num_parts)
        return Evidence((of_ranks + of_alarms) / 2.0, of_ranks, of_alarms, p_value)

    @property
    def would_begin_now(self) -> bool:
        """Whether a change that is noticed later began with the last part, as far as is known by now."""
        return self.num_parts == self._lowest_at + 1

    def _look(self, evidence: Evidence) -> None:
        if evidence.total <= self._lowest:
            self._lowest, self._lowest_at = evidence.total, self.num_parts
        if evidence.total >= 1.0 / self.chance:
            self.drifted_at, self.began_at = self.num_parts, self._lowest_at + 1
            rising, _, falling = self.of_ranks
            self.direction = "higher" if rising > falling else "lower"
            if evidence.of_alarms > evidence.of_ranks:
                self.direction = "alarms"
