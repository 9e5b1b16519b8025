"""One verdict for a part that is photographed several times, whose false-alarm rate holds for parts.

Each picture of a good part has a p-value that is at most `a` in at most a share `a` of all cases. Of k pictures, one is
at most rate / k in at most a share `rate` of cases, however much the pictures depend on each other (Bonferroni). So k
times the least p-value, at most 1, is a p-value of the part, and needs no calibration of its own. Its price is that n
good images give no p-value below 1 / (n + 1): a part of k pictures can raise an alarm only where n + 1 >= k / rate.
"""

from __future__ import annotations

import csv
import math
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffad.files import write_whole
from diffad.prediction.journal import ENCODING, SCORES_NAME, read_rows
from diffad.prediction.manifest import LOOK_FOR
from diffad.reading.unicode_forms import file_below

PART_VERDICTS_NAME = "part_verdicts.csv"
COLUMNS = ("part", "verdict", "p_value", "pictures", "not_scored", "most_anomalous")
VERDICTS = ("normal", "anomalous", "incomplete")
ROUNDING = 1e-5  # of the p-values in scores.csv, which have six digits


def read_parts(path: str | os.PathLike) -> dict[str, str]:
    """Which part each picture shows: by the picture's file, with every link resolved.

    Args:
        path: CSV with the columns `image` and `part`, in any case. An image's path counts from the CSV's folder or,
            where no file is there, from the working folder.

    Raises:
        FileNotFoundError: there is no such file, or an image of it is missing.
        ValueError: a column is missing, a part has no name, or a picture is said to show two parts.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"`parts`: there is no file at {path}.")
    parts: dict[str, str] = {}
    with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        # strict, as a quotation mark that is never closed would swallow the lines behind it
        rows = csv.DictReader(file, strict=True)
        lines: list[tuple[int, str, str]] = []
        try:
            rows.fieldnames = [name.strip().lower() for name in rows.fieldnames or ()]
            if not {"image", "part"} <= set(rows.fieldnames):
                raise ValueError(
                    f"`parts`: {path} must have the columns image and part, with a comma between them, but has "
                    f"{rows.fieldnames}."
                )
            for row in rows:
                lines.append((rows.line_num, row["image"] or "", (row["part"] or "").strip()))
        except csv.Error as error:
            begins = (lines[-1][0] if lines else 1) + 1
            raise ValueError(f"`parts`: line {begins} of {path} is no CSV ({error}). {LOOK_FOR}") from error
        for number, image, part in lines:
            names = (image, image.strip())  # without spaces beside a comma, unless they are of the file's name
            places = (file_below(folder, name) for name in names for folder in (path.parent, ""))
            place = next((one for one in places if one.is_file()), None)
            if place is None:
                raise FileNotFoundError(f"`parts`: line {number} of {path} names {image!r}, which is no file.")
            if not part:
                raise ValueError(f"`parts`: line {number} of {path} names no part.")
            if parts.setdefault(os.path.realpath(place), part) != part:
                raise ValueError(f"`parts`: {path} names two parts for {image}. Keep one of the lines.")
    return parts


def check_parts(parts: dict[str, str], paths: Sequence[Path], pipeline: Any, category: str | None) -> float:
    """Says before anything is scored what would leave a part without a verdict.

    Args:
        parts: as of `read_parts`.
        paths: the pictures that are to be scored.
        pipeline: a calibrated one.
        category: of a unified model.

    Returns:
        The share of good parts that may raise an alarm: the calibration's false-alarm rate.

    Raises:
        ValueError: a picture has no part, the pipeline is not calibrated, or by too few good images for a part of so
            many pictures.
    """
    index = pipeline.category_index(category)
    num_good = pipeline.calibration.num_good_images(index) if pipeline.has_thresholds else 0
    if not num_good:
        raise ValueError("`parts` takes a calibrated pipeline: only that has p-values. Run `diffad calibrate` first.")
    rate = pipeline.calibration.stated_false_alarm_rate(index)
    without = [path for path in paths if os.path.realpath(path) not in parts]
    if without:
        raise ValueError(f"`parts` names no part for {len(without)} images, {without[0]} first. Add a line for each.")
    part, most = Counter(parts.values()).most_common(1)[0]
    if most > rate * (1.0 + ROUNDING) * (num_good + 1):
        raise ValueError(
            f"`parts`: {part!r} has {most} pictures, and {num_good} good images give no p-value below "
            f"{1.0 / (num_good + 1):.2g}, so it could raise no alarm at a false-alarm rate of {rate:g}. Calibrate with "
            f"at least {math.ceil(most / rate - 1e-9) - 1} good images for the thresholds, with a false-alarm rate of "
            f"at least {most / (num_good + 1):.2g}, or give fewer pictures a part."
        )
    return rate


def write_part_verdicts(output_dir: Path, parts: dict[str, str], rate: float) -> dict[str, int]:
    """Writes `part_verdicts.csv` of what `scores.csv` holds, a row for each part in the order of `parts`.

    A part is anomalous where its p-value is at most `rate`. Else it is incomplete where one of its pictures has no
    score, as that might have raised the alarm, and otherwise normal.

    Returns:
        Counts of parts by verdict.
    """
    num_pictures = Counter(parts.values())
    num_scored: Counter[str] = Counter()
    least: dict[str, tuple[float, str]] = {}
    for row in read_rows(output_dir / SCORES_NAME):
        part = parts.get(row["file"])
        if part is None or not row["p_value"]:
            continue
        num_scored[part] += 1
        least[part] = min(least.get(part, (math.inf, "")), (float(row["p_value"]), row["path"]))
    counts = dict.fromkeys(VERDICTS, 0)
    with write_whole(output_dir / PART_VERDICTS_NAME) as unfinished, open(unfinished, "w", **ENCODING) as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for part, pictures in num_pictures.items():
            p_value, path = least.get(part, (1.0, ""))
            p_value, missing = min(1.0, pictures * p_value), pictures - num_scored[part]
            verdict = "anomalous" if p_value <= rate * (1.0 + ROUNDING) else "incomplete" if missing else "normal"
            counts[verdict] += 1
            writer.writerow((part, verdict, f"{p_value:.6g}", pictures, missing, path))
    return counts
