"""The table of what `diffad predict` has found: kept row by row while it runs, and taken up by the next run.

`scores.csv` appears only when every input is accounted for; until then rows stand in `scores.partial.csv`. Names of
files that are no UTF-8 keep their bytes in both.
"""

from __future__ import annotations

import csv
import os
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from diffad.files import bounded_name, digest, write_whole
from diffad.inputs import absolute_place

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
VERDICTS = ("normal", "anomalous", "unreadable", "scored")
SCORES_NAME, JOURNAL_NAME = "scores.csv", "scores.partial.csv"
CALIBRATION_NAME = "calibration.json"  # beside scores.csv: what its scores are ranked among
ENCODING: dict[str, Any] = {"newline": "", "encoding": "utf-8", "errors": "surrogateescape"}


class Input(NamedTuple):
    """An image file, as it was before it was read.

    path: as it was given.
    file: with every link resolved: two names of a file have one.
    size: in bytes; "" where there is no file.
    modified: nanoseconds since 1970, with the former what tells a file from another one of its name.
    """

    path: Path
    file: str
    size: str
    modified: str


def describe_input(path: Path) -> Input:
    file = os.path.realpath(path)
    try:
        status = os.stat(file)
    except OSError:
        return Input(path, file, "", "")
    return Input(path, file, str(status.st_size), str(status.st_mtime_ns))


def distinct_inputs(paths: Sequence[Path]) -> list[Input]:
    """Each file once, under the first of its names."""
    found: dict[str, Input] = {}
    for path in paths:
        described = describe_input(path)
        found.setdefault(os.path.normcase(described.file), described)
    return list(found.values())


def read_rows(path: Path) -> Iterator[dict[str, str]]:
    """Rows of a table that is whole or, killed, broken off in its last line."""
    if path.is_file():
        with open(path, **ENCODING) as file:
            for row in csv.DictReader(file):
                if None not in row.values() and None not in row and row.get("verdict") in VERDICTS:
                    yield {column: row.get(column, "") for column in COLUMNS}


def check_scores(output_dir: Path) -> None:
    """Raises where a table of another program's stands in the place of ours."""
    for name in (SCORES_NAME, JOURNAL_NAME):
        path = output_dir / name
        if path.is_file():
            with open(path, **ENCODING) as file:
                header = next(csv.reader(file), [])
            if header and not {"path", "score", "verdict"} <= set(header):
                raise ValueError(f"{path} is no table of diffad's, and would be replaced. Give another `output_dir`.")


class Done(NamedTuple):
    """What earlier runs have done.

    verdicts: by file.
    pictures: the file that a picture shows, by its name as `picture_key`.
    """

    verdicts: dict[str, str]
    pictures: dict[str, str]


def take_up(output_dir: Path, inputs: Sequence[Input], root: str) -> Done:
    """Begins the journal with what earlier runs have done, with names below `root`.

    Left out are what a killed run left of a line, and those `inputs` that could not be read or written, or whose file
    has been replaced since: they are done again.
    """
    done = Done({}, {})
    now = {one.file: one for one in inputs}
    with write_whole(output_dir / JOURNAL_NAME) as unfinished, open(unfinished, "w", **ENCODING) as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for name in (SCORES_NAME, JOURNAL_NAME):
            for row in read_rows(output_dir / name):
                if not row["file"]:  # version 0.1 wrote paths alone
                    row["file"] = os.path.realpath(row["path"])
                    place = place_below(root, Path(row["path"]))
                    if place is not None and row["score"]:
                        row["picture"] = place.as_posix() + ("" if place.suffix == ".png" else ".png")
                wanted = now.get(row["file"])
                if wanted is not None and (
                    row["verdict"] == "unreadable" or row["message"] or _is_replaced(row, wanted)
                ):
                    continue
                if row["file"] not in done.verdicts:
                    writer.writerow(row)
                    done.verdicts[row["file"]] = VERDICTS[VERDICTS.index(row["verdict"])]  # one string for all rows
                    if row["picture"]:
                        done.pictures[picture_key(row["picture"])] = row["file"]
    return done


def _is_replaced(row: dict[str, str], wanted: Input) -> bool:
    return bool(row["size"]) and (row["size"], row["modified"]) != (wanted.size, wanted.modified)


def common_folder(inputs: Sequence[Input]) -> str:
    """The folder that all inputs lie below.

    Raises:
        ValueError: there is none, as they lie on several drives.
    """
    try:
        return os.path.commonpath({str(absolute_place(one.path).parent) for one in inputs})
    except ValueError as error:
        raise ValueError(
            "The images lie on several drives. Give those of each drive an `output_dir` of its own."
        ) from error


def place_below(root: str, path: Path) -> Path | None:
    """A file's place below `root`, by its own path or by that with all links resolved; None if it lies elsewhere."""
    for one, folder in ((absolute_place(path), root), (os.path.realpath(path), os.path.realpath(root))):
        if Path(one).is_relative_to(folder):
            return Path(one).relative_to(folder)
    return None


def picture_key(name: str) -> str:
    """Equal for names that some file systems do not tell apart."""
    return unicodedata.normalize("NFC", name).casefold()


def name_pictures(places: Iterable[tuple[str, Path]], taken: dict[str, str], suffix: str = ".png") -> dict[str, str]:
    """A name for each file's pictures, with `/`, below a folder; no two files share one.

    Args:
        places: of each file, by `Input.file`, its place below the common folder.
        taken: what names are another file's, as `Done.pictures`.
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
