"""What a table of scores says of drift: the test over its rows, one sentence, and a picture."""

from __future__ import annotations

import json
from array import array
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from diffad.calibration.drift import DriftTest, shown_score
from diffad.files import write_text_whole, write_whole
from diffad.prediction.journal import CALIBRATION_NAME, read_rows

HOW = {
    "higher": "Parts score higher than before.",
    "lower": "Parts score lower than before.",
    "alarms": "More than half of the parts raise an alarm.",
}


def save_calibration_scores(output_dir: Path, pipeline: Any, category: int) -> None:
    """Keeps beside `scores.csv` the held-out good images' scores that a calibrated pipeline has of a category."""
    scores = pipeline.calibration.good_scores(category)
    kept = CalibrationScores([shown_score(score) for score in scores], pipeline.calibration.false_alarm_rate)
    write_text_whole(output_dir / CALIBRATION_NAME, json.dumps(kept._asdict()) + "\n")


class CalibrationScores(NamedTuple):
    """What a table's scores are ranked among.

    normal_scores: of held-out good images; none where nothing stands beside the table.
    false_alarm_rate: at which the threshold was set.
    """

    normal_scores: list[float]
    false_alarm_rate: float

    @classmethod
    def beside(cls, table: Path) -> CalibrationScores:
        """Those that stand beside a `scores.csv`.

        Raises:
            ValueError: what stands there is no file of diffad's.
        """
        path = table.with_name(CALIBRATION_NAME)
        if not path.is_file():
            return cls([], 0.01)
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} is damaged. Run `diffad predict` again, which writes it.") from error


class TableDrift:
    """The drift test over a table's rows, in their order; what has no score is passed over.

    Args:
        path: of a `scores.csv`. The calibration's scores are taken from beside it; without them parts are ranked among
            the earlier ones alone.
        chance: as of `DriftTest`.

    Attributes:
        test: after the last row.
        p_values, evidence: of each part, (n,) float32; NaN where it was left out of the ranks.
        names: of the parts at which drift was found and about where it began.

    Raises:
        FileNotFoundError: there is no table.
        ValueError: it has no score, or one that is no number, or what stands beside it is no file of diffad's.
    """

    def __init__(self, path: str | Path, chance: float = 0.01):
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"There is no table at {path}. Give the scores.csv that `diffad predict` wrote.")
        known = CalibrationScores.beside(path)
        self.test = DriftTest(known.normal_scores, known.false_alarm_rate, chance)
        self.p_values, self.evidence = array("f"), array("f")
        self.names: dict[int, str] = {}
        began = ""
        for row in read_rows(path):
            if not row["score"]:
                continue
            evidence = self.test.update(float(row["score"]))
            self.p_values.append(np.nan if evidence.p_value is None else evidence.p_value)
            self.evidence.append(min(evidence.total, 1e30))
            if self.test.drifted_at is None:
                began = row["path"] if self.test.would_begin_now else began
            elif self.test.drifted_at == self.test.num_parts:
                self.names = {self.test.began_at or 0: began or row["path"], self.test.num_parts: row["path"]}
        if not self.evidence:
            raise ValueError(
                f"{path} holds no score. Give the scores.csv of `diffad predict` as it was written, in UTF-8 and with "
                "commas between its columns."
            )

    def sentence(self) -> str:
        """What was found, for the one at the line."""
        return describe(self.test, max(self.evidence), self.names)


def describe(test: DriftTest, highest: float, names: dict[int, str] | None = None) -> str:
    """One sentence or two: whether there was drift, in how many parts, and since when.

    Args:
        test: after the last part.
        highest: evidence so far.
        names: of parts, by their number.
    """
    left_out = f"{test.num_left_out} at or above the alarm threshold left out"
    limit = f"{1.0 / test.chance:g}"
    rare = f"parts that are as the calibration's get there in at most {test.chance:.2g} of all cases, ever"
    if test.drifted_at is None:
        return (
            f"No drift in {test.num_parts} parts ({left_out}): the evidence was {highest:.3g} at most, and {limit} is "
            f"an alarm ({rare})."
        )
    at, began = (
        f"part {number}{f' ({(names or {})[number]})' if number in (names or {}) else ''}"
        for number in (test.drifted_at, test.began_at)
    )
    return (
        f"DRIFT: at {at} the evidence reached {limit} ({rare}). It began at about {began}. {HOW[test.direction or '']} "
        f"Look at light, focus and the parts' place; if this is how it is to stay, calibrate again ({left_out})."
    )


def is_png(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(4) == b"\x89PNG"


def draw_drift(found: TableDrift, path: str | Path) -> None:
    """The parts' p-values above, which are even as long as nothing changes, and below them the evidence."""
    path = Path(path)
    parts = np.arange(1, len(found.evidence) + 1)
    from matplotlib.figure import Figure  # an exported model is watched over without it

    figure = Figure(figsize=(9, 5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    above.plot(parts, found.p_values, ".", markersize=3, color="#31688e", rasterized=True)
    above.set(ylabel="online p-value", ylim=(0, 1))
    below.plot(parts, found.evidence, color="#31688e")
    below.axhline(1.0 / found.test.chance, color="black", linestyle="--", linewidth=1, label="alarm")
    if found.test.drifted_at is not None:
        for axes in (above, below):
            axes.axvline(found.test.began_at, color="grey", linestyle=":", label="it began about here")
            axes.axvline(found.test.drifted_at, color="#d1495b", label="noticed")
    below.set(xlabel="part, in the table's order", ylabel="evidence", yscale="log")
    below.legend(loc="upper left")
    path.parent.mkdir(parents=True, exist_ok=True)
    with write_whole(path) as unfinished:
        figure.savefig(unfinished, dpi=110, format="png")
