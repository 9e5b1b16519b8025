"""The table of what `diffad predict` has found: kept row by row while it runs, and taken up by the next run.

`scores.csv` appears only when every input is accounted for. Until then each process of a run keeps a journal of its
own, `scores.partial-0.csv`, ..., and `scores.partial.csv` holds what earlier runs had done. All of them are in order of
the inputs' places, which are their first column, so that they are merged line by line. Names of files that are no UTF-8
keep their bytes.
"""

from __future__ import annotations

import csv
import heapq
import math
import os
import unicodedata
from collections.abc import Iterable, Iterator
from itertools import chain, groupby
from pathlib import Path
from typing import IO, Any, Protocol

from diffad.files import bounded_name, digest, write_whole

COLUMNS = (
    "path",
    "score",
    "p_value",
    "verdict",
    "map_low",
    "map_high",
    "message",
    "picture",
    "file",
    "size",
    "modified",
)
JOURNAL_COLUMNS = ("place", *COLUMNS)
PLACE, PATH, SCORE, P_VALUE, VERDICT, _, _, MESSAGE, PICTURE, FILE, SIZE, MODIFIED = range(len(JOURNAL_COLUMNS))
EARLIER = -1  # the place of rows that earlier runs have completed: above all others
VERDICTS = ("normal", "anomalous", "unreadable", "scored")
SCORES_NAME, JOURNAL_NAME = "scores.csv", "scores.partial.csv"
CALIBRATION_NAME = "calibration.json"  # beside scores.csv: what its scores are ranked among
ENCODING: dict[str, Any] = {"newline": "", "encoding": "utf-8", "errors": "surrogateescape"}
READ_ENCODING = ENCODING | {"encoding": "utf-8-sig"}  # Excel begins what it saves with a byte order mark


def read_rows(path: Path) -> Iterator[dict[str, str]]:
    """Rows of a table that is whole or, killed, broken off in its last line.

    Raises:
        ValueError: a number has become none, as somebody has edited it.
    """
    if path.is_file():
        with open(path, **READ_ENCODING) as file:
            for row in csv.DictReader(_whole_lines(file)):  # half a number would pass for one
                if None not in row.values() and None not in row and row.get("verdict") in VERDICTS:
                    known = {column: row.get(column, "") for column in COLUMNS}
                    check_numbers(path, known["path"], known["score"], known["p_value"])
                    yield known


def check_scores(output_dir: Path) -> None:
    """Raises where a table of another program's stands in the place of ours, or ours has columns of another's."""
    for name in (SCORES_NAME, JOURNAL_NAME):
        path = output_dir / name
        if path.is_dir():
            raise ValueError(f"{path} is a folder in the table's place. Give another `output_dir`, or take it away.")
        if path.is_file():
            with open(path, **READ_ENCODING) as file:
                header = next(csv.reader(file), [])
            if header and not {"path", "score", "verdict"} <= set(header):
                raise ValueError(f"{path} is no table of diffad's, and would be replaced. Give another `output_dir`.")
            known = COLUMNS if name == SCORES_NAME else JOURNAL_COLUMNS
            if others := [column for column in header if column not in known]:
                raise ValueError(
                    f"{path} has the column {others[0]!r}, which would be lost: keep it in a file of its own, and take "
                    "it out of this one, or give another `output_dir`."
                )


def check_numbers(table: Path, image: str, score: str, p_value: str) -> None:
    """Raises where a row of a table holds what is no number: after the run, nothing could be made of it."""
    for name, text in (("score", score), ("p_value", p_value)):
        try:
            is_number = not text or not math.isnan(float(text))
        except ValueError:
            is_number = False
        if not is_number:
            raise ValueError(
                f"{table} holds the {name} {text!r} of {image}: it is no number. Put the number back, or take the row "
                "away and run again, which scores the image anew."
            )


class Inputs(Protocol):
    """What `take_up` asks of the inputs, in memory or a stream."""

    def take(self, row: list[str], is_complete: bool) -> int | None:
        """Notes that an earlier run has done a row's input.

        Args:
            row: with `JOURNAL_COLUMNS`.
            is_complete: whether it stands in `scores.csv`.

        Returns:
            The place of the row among all; None where it does not count, as it stands there twice or is to be done
            again.
        """
        ...


def process_journals(output_dir: Path) -> list[Path]:
    """Those of a run's processes, sorted."""
    return sorted(path for path in output_dir.glob("scores.partial-*.csv") if path.stem.split("-")[1].isdigit())


def by_process(paths: Iterable[Path]) -> Iterator[list[Path]]:
    """Sorted names of journals, those of each process of a run in their order; a store's come in segments.

    A process's own are in order of places, one after another. So as many files are open as there were processes.
    """
    for _, segments in groupby(paths, key=lambda path: path.stem.split("-")[:3]):
        yield list(segments)


def process_journal(output_dir: Path, process: int) -> Path:
    return output_dir / f"scores.partial-{process}.csv"


def read_journal(path: Path) -> Iterator[list[str]]:
    """Rows of a journal, as lists with `JOURNAL_COLUMNS`; what a killed process has left of a last line is no row.

    Of an earlier version's, which has no places, all are `EARLIER`. Raises as `read_rows`.
    """
    if not path.is_file():
        return
    with open(path, **READ_ENCODING) as file:
        rows = csv.reader(_whole_lines(file))
        if next(rows, None) == list(JOURNAL_COLUMNS):
            for row in rows:
                if len(row) == len(JOURNAL_COLUMNS) and row[VERDICT] in VERDICTS:
                    check_numbers(path, row[PATH], row[SCORE], row[P_VALUE])
                    yield row
            return
    for known in read_rows(path):
        yield [str(EARLIER), *known.values()]


def _has_places(path: Path) -> bool:
    """Whether a journal is there, and none of an earlier version."""
    if not path.is_file():
        return False
    with open(path, **READ_ENCODING) as file:
        return next(csv.reader(file), None) == list(JOURNAL_COLUMNS)


def _whole_lines(file: IO[str]) -> Iterator[str]:
    return (line for line in file if line.endswith(("\n", "\r")))


def take_up(output_dir: Path, inputs: Inputs) -> None:
    """Begins `scores.partial.csv` with what earlier runs have done, and tells `inputs` of it.

    Left out are what a killed run left of a line, and inputs that could not be read or written, or whose file has been
    replaced since: they are done again.
    """
    journals = process_journals(output_dir)
    begun = merged_journals(output_dir)
    # a run that has begun has taken up `scores.csv` already, and its journals are in the order of places
    table = () if _has_places(output_dir / JOURNAL_NAME) else read_rows(output_dir / SCORES_NAME)
    complete = ([str(i), *row.values()] for i, row in enumerate(table))
    with write_whole(output_dir / JOURNAL_NAME) as unfinished, open(unfinished, "w", **ENCODING) as file:
        writer = csv.writer(file)
        writer.writerow(JOURNAL_COLUMNS)
        for rows, is_complete in ((complete, True), (begun, False)):
            for row in rows:
                if (place := inputs.take(row, is_complete)) is not None:
                    writer.writerow([place, *row[1:]])
    for path in journals:
        path.unlink()


def merged_journals(output_dir: Path) -> Iterator[list[str]]:
    """All rows in the order of their places, without the journals in memory."""
    journals = [[output_dir / JOURNAL_NAME], *by_process(process_journals(output_dir))]
    return heapq.merge(*(chain.from_iterable(map(read_journal, one)) for one in journals), key=_place)


def complete_scores(output_dir: Path) -> None:
    """Makes `scores.csv` of the journals."""
    with write_whole(output_dir / SCORES_NAME) as unfinished, open(unfinished, "w", **ENCODING) as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        writer.writerows(row[1:] for row in merged_journals(output_dir))
    for path in (output_dir / JOURNAL_NAME, *process_journals(output_dir)):
        path.unlink()


def _place(row: list[str]) -> int:
    return int(row[PLACE])


def picture_key(name: str) -> str:
    """Equal for names that some file systems do not tell apart."""
    return unicodedata.normalize("NFC", name).casefold()


def name_pictures(places: Iterable[tuple[str, Path]], taken: dict[str, str], suffix: str = ".png") -> dict[str, str]:
    """A name for each file's pictures, with `/`, below a folder; no two files share one.

    Args:
        places: of each file, by `Input.file`, its place below the common folder.
        taken: what names are another file's, as `ListedFiles` knows them.
        suffix: of all names.

    Returns:
        By file: its place, in names of bounded length that end in `suffix`. Where that is another's, a digest is added.
    """
    places = list(places)
    taken = dict(taken)
    folders = {picture_key("/".join(place.parts[:i])) for _, place in places for i in range(1, len(place.parts))}
    folders |= {"/".join(name.split("/")[:i]) for name in taken for i in range(1, name.count("/") + 1)}
    names = {}
    for file, place in places:
        parts = [bounded_name(part) for part in place.parts[:-1]]
        stem = place.name.removesuffix(suffix)
        plain = "/".join([*parts, bounded_name(stem, suffix)])
        marked = "/".join([*parts, bounded_name(f"{stem}-{digest(file)}", suffix)])
        for name in (plain, marked, f"{digest(file)}{suffix}", f"{digest(file + os.sep)}{suffix}"):
            key = picture_key(name)
            above = ("/".join(key.split("/")[:i]) for i in range(1, key.count("/") + 1))
            if taken.get(key, file) == file and key not in folders and not any(one in taken for one in above):
                break
        taken[key] = file
        names[file] = name
    return names
