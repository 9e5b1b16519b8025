"""Images by reference, read as a stream and never all in memory: a table of paths or URLs."""

from __future__ import annotations

import csv
import hashlib
import os
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from diffad.files import bounded_name
from diffad.installation import needs_extra
from diffad.prediction.journal import ENCODING, FILE, MESSAGE, MODIFIED, PICTURE, PLACE, SIZE, VERDICT, VERDICTS
from diffad.reading.input_file import Input
from diffad.reading.inputs import is_image_name
from diffad.reading.remote_files import is_url, open_remote
from diffad.reading.unicode_forms import file_below

COLUMN_NAMES = ("path", "image", "url", "file_name")
# where a table is no CSV
LOOK_FOR = "Look for a quotation mark without its other, or for text or a space behind a closing one."
IN_A_FOLDER = 1000  # pictures
FAR_LOOKED_AT = 5  # images that tell whether a manifest names those of a store
ROWS_AT_ONCE = 65_536  # of a parquet file, in memory


class Manifest:
    """Images by reference, in the order of a table's lines, with what earlier runs have done of them.

    Each line but a blank one is an image of its own: one that is named twice is scored twice, and one that names none,
    as a field is missing or empty, is an image that cannot be read. Of what is done a bit of memory a line is kept, and
    nothing else.

    Args:
        path: a CSV or parquet file with a column `path`, `image`, `url` or `file_name`; a CSV without any of them has
            no header, and its first column counts. Paths count from the manifest's own folder. Manifest and lines may
            be URLs of any store that fsspec knows.

    Attributes:
        root: the folder that paths count from.
        counts: of the lines that are done, by verdict.
        num_without_pictures: of these.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it has no line, is no CSV or parquet file, or has none of the columns: a CSV without a header must
            begin with an image.
    """

    def __init__(self, path: str | Path):
        self._begin(path)
        if next(self.entries(), None) is None:
            raise ValueError(f"{path} has no line, and must have one for each image.")

    def _begin(self, path: str | os.PathLike) -> None:
        self.path = os.fspath(path)
        if not is_url(self.path) and not os.path.isfile(path):
            raise FileNotFoundError(f"There is no file at {path}.")
        self.folder = os.path.dirname(self.path)
        self.root = self.folder if is_url(self.path) else os.path.realpath(self.folder)
        self.counts = dict.fromkeys(VERDICTS, 0)
        self.num_without_pictures = 0
        self._done = bytearray()  # a bit a line

    @property
    def are_far(self) -> bool:
        """Whether the first images lie in a store."""
        return any(is_url(one.path) for one in self.first(FAR_LOOKED_AT))

    def common_root(self) -> str:
        """The manifest's folder."""
        return self.root

    def digest(self) -> str:
        """Tells the manifest's contents from any other's, and its folder, from which paths count."""
        whole = hashlib.sha256(os.fsencode(self.root))
        with self._open("rb") as file:
            while block := file.read(2**20):
                whole.update(block)
        return whole.hexdigest()

    def entries(self) -> Iterator[str]:
        """Paths and URLs, as they stand in the manifest; "" where a line names no image."""
        return map(self._trimmed, self._of_parquet() if self.path.lower().endswith(".parquet") else self._of_csv())

    def _trimmed(self, entry: str) -> str:
        """Without spaces behind it, unless they are of the file's name."""
        trimmed = entry.rstrip()
        is_name = trimmed != entry and not is_url(entry) and os.path.isfile(os.path.join(self.folder, entry))
        return entry if is_name else trimmed

    def _open(self, mode: str) -> Any:
        if is_url(self.path):
            return open_remote(self.path, mode)
        return open(self.path, mode, **({} if "b" in mode else ENCODING | {"encoding": "utf-8-sig"}))

    def _of_csv(self) -> Iterator[str]:
        num_read = 0  # lines, of whole rows

        def filled_rows() -> Iterator[list[str]]:
            nonlocal num_read
            # strict, as a quotation mark that is never closed would swallow the lines behind it
            reader = csv.reader(file, skipinitialspace=True, strict=True)
            for row in reader:
                num_read = reader.line_num
                if row:
                    yield row

        with self._open("r") as file:
            rows = filled_rows()
            try:
                first = next(rows, [])
                names = [cell.strip().lower() for cell in first]
                column = next((names.index(name) for name in COLUMN_NAMES if name in names), None)
                if column is None and first:
                    self._check_first(first)
                    yield first[0]
                for row in rows:
                    yield row[column or 0] if len(row) > (column or 0) else ""
            except csv.Error as error:
                raise ValueError(
                    f"`images`: line {num_read + 1} of {self.path} is no CSV ({error}). {LOOK_FOR}"
                ) from error

    def _check_first(self, row: list[str]) -> None:
        """Raises where the first line of a CSV is neither a header that is known nor an image's."""
        entry = self._trimmed(row[0])
        if is_url(entry) or is_image_name(os.path.basename(entry)) or os.path.isfile(os.path.join(self.folder, entry)):
            return
        shown = os.fsencode(",".join(row)).decode("utf-8", "backslashreplace")[:200]
        raise ValueError(
            f"`images`: the first line of {self.path}, {shown!r}, has none of the columns {', '.join(COLUMN_NAMES)}, "
            "and does not begin with an image. Name the column so, in a table in UTF-8 with commas between its fields."
        )

    def _of_parquet(self) -> Iterator[str]:
        with needs_extra("remote", "train"):
            from pyarrow import parquet
        with self._open("rb") as opened, parquet.ParquetFile(opened) as file:
            names = {name.strip().lower(): name for name in reversed(file.schema_arrow.names)}
            column = next((names[name] for name in COLUMN_NAMES if name in names), None)
            if column is None:
                has = file.schema_arrow.names
                raise ValueError(f"{self.path} must have a column {', '.join(COLUMN_NAMES)}, but has {has}.")
            kind = file.schema_arrow.field(column).type
            if "string" not in str(kind):
                raise ValueError(f"`images`: column {column} of {self.path} must hold paths or URLs, but holds {kind}.")
            for batch in file.iter_batches(ROWS_AT_ONCE, columns=[column]):
                yield from (entry or "" for entry in batch.column(0).to_pylist())

    def count_up_to(self, limit: int) -> int:
        """How many lines there are, counting no further than `limit`."""
        return sum(1 for _ in islice(self.entries(), limit))

    def first(self, count: int) -> list[Input]:
        """The images of the first `count` lines that name one."""
        return [self._input(entry) for entry in islice(filter(None, self.entries()), count)]

    def take(self, row: list[str], is_complete: bool) -> int | None:
        """As of `diffad.prediction.journal.Inputs`: a row's place is its line's."""
        place = int(row[PLACE])
        if row[VERDICT] == "unreadable" or row[MESSAGE] or self._is_done(place) or self._is_replaced(row):
            return None
        self._done.extend(bytes(max(0, place // 8 + 1 - len(self._done))))
        self._done[place // 8] |= 1 << place % 8
        self.counts[row[VERDICT]] += 1
        self.num_without_pictures += not row[PICTURE]
        return place

    def _is_replaced(self, row: list[str]) -> bool:
        """Whether a local file is another one than was scored; what is gone, or lies in a store, is taken to be it."""
        if not row[SIZE] or is_url(row[FILE]):
            return False
        now = self._input(row[FILE])
        return bool(now.size) and (row[SIZE], row[MODIFIED]) != (now.size, now.modified)

    def _is_done(self, place: int) -> bool:
        return place // 8 < len(self._done) and bool(self._done[place // 8] >> place % 8 & 1)

    def place_of_line(self, line: dict[str, Any]) -> int | None:
        """The place of a line of regions; None where its image is not done."""
        return line["place"] if self._is_done(line["place"]) else None

    def place_when_complete(self, line: dict[str, Any]) -> int:
        """As of `ListedFiles`; an image of a manifest keeps its place."""
        return line["place"]

    def name(self, place: int, one: Input) -> str:
        """Of an image in lists; of several lines one image has several."""
        return one.file

    def todo(self, is_own: Callable[[int], bool], with_pictures: bool) -> Iterator[tuple[int, Input, str]]:
        """As of `ListedFiles`."""
        for place, entry in enumerate(self.entries()):
            if not self._is_done(place) and is_own(place):
                picture = ""
                if with_pictures:
                    stem = os.path.splitext(os.path.basename(entry))[0]
                    picture = f"{place // IN_A_FOLDER:06}/{bounded_name(f'{place:09}-{stem}', '.png')}"
                yield place, self._input(entry), picture

    def _input(self, entry: str) -> Input:
        if not entry:
            return Input("", "", "", "")
        path = entry if is_url(entry) else os.path.join(self.folder, entry)
        if is_url(path):
            return Input(path, entry, "", "")
        file = file_below(self.folder, entry)
        try:
            status = os.stat(file)
        except (OSError, ValueError):  # it is gone, or its name none that a file can have
            return Input(file, entry, "", "")
        return Input(file, entry, str(status.st_size), str(status.st_mtime_ns))
