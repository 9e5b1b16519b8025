"""The inputs of `diffad predict` where they are files in memory, each once."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from diffad.files import digest
from diffad.prediction.journal import (
    EARLIER,
    FILE,
    MESSAGE,
    MODIFIED,
    PATH,
    PICTURE,
    PLACE,
    SCORE,
    SIZE,
    VERDICT,
    VERDICTS,
    name_pictures,
    picture_key,
)
from diffad.reading.input_file import Input, common_folder, distinct_inputs, place_below

SHARD_FROM = 100_000  # of so many pictures a folder, many programs no longer open it


class ListedFiles:
    """Image files, with what earlier runs have done of them.

    Args:
        paths: as from `find_images` or `list_remote`; a file of several names counts once.

    Attributes:
        root: the folder that names start from: that of earlier results, or `common_root`.
        counts: of the files that are done, by verdict.
        num_without_pictures: of these.
    """

    def __init__(self, paths: Sequence[Path | Input]):
        self.inputs = distinct_inputs(paths)
        self.root = ""
        self.counts = dict.fromkeys(VERDICTS, 0)
        self.num_without_pictures = 0
        self._index = {one.file: i for i, one in enumerate(self.inputs)}
        self._done: dict[str, int] = {}  # the place of its row, by file
        self._pictures: dict[str, str] = {}  # the file that a picture shows, by its name as `picture_key`

    def digest(self) -> None:
        """Files may come and go between runs."""

    def count_up_to(self, limit: int) -> int:
        """How many files there are, counting no further than `limit`."""
        return min(len(self.inputs), limit)

    @property
    def are_far(self) -> bool:
        """Whether they lie in a store."""
        return isinstance(self.inputs[0].path, str)

    def common_root(self) -> str:
        """The folder that all files lie below."""
        return common_folder(self.inputs)

    def take(self, row: list[str], is_complete: bool) -> int | None:
        """As of `diffad.prediction.journal.Inputs`."""
        if not row[FILE]:  # version 0.1 wrote paths alone
            row[FILE] = os.path.realpath(row[PATH])
            below = place_below(self.root, row[PATH])
            if below is not None and row[SCORE]:
                row[PICTURE] = below.as_posix() + ("" if below.suffix == ".png" else ".png")
        file = row[FILE]
        index = self._index.get(file)
        if index is not None and (
            row[VERDICT] == "unreadable" or row[MESSAGE] or _is_replaced(row, self.inputs[index])
        ):
            return None
        if file in self._done:
            return None
        is_earlier = is_complete or index is None or int(row[PLACE]) == EARLIER
        place = self._done[file] = EARLIER if is_earlier or index is None else index
        if index is not None:
            self.counts[row[VERDICT]] += 1
            self.num_without_pictures += not row[PICTURE]
        if row[PICTURE]:
            self._pictures[picture_key(row[PICTURE])] = file
        return place

    def place_of_line(self, line: dict[str, Any]) -> int | None:
        """The place of a line of regions; None where its file is not done."""
        return self._done.get(line["file"])

    def place_when_complete(self, line: dict[str, Any]) -> int:
        """What stands in a complete table of regions: of files, which may come and go, the order alone."""
        return EARLIER

    def name(self, place: int, one: Input) -> str:
        """Below the root, with `/`."""
        below = place_below(self.root, one.path)
        return str(one.path) if below is None else below.as_posix()

    def todo(self, is_own: Callable[[int], bool], with_pictures: bool) -> Iterator[tuple[int, Input, str]]:
        """Inputs that are not done and whose place is this process's: place, input, name of its pictures or "".

        Raises:
            ValueError: an input lies outside the root.
        """
        left = [(i, one) for i, one in enumerate(self.inputs) if one.file not in self._done]
        places = [(one.file, self._place(one)) for _, one in left]
        if len(self.inputs) > SHARD_FROM:
            places = [(file, Path(digest(file)[:2], place)) for file, place in places]
        names = name_pictures(places, self._pictures) if with_pictures else {}
        for i, one in left:
            if is_own(i):
                yield i, one, names.get(one.file, "")

    def _place(self, one: Input) -> Path:
        below = place_below(self.root, one.path)
        if below is None:
            raise ValueError(
                f"`output_dir` holds results of images in {self.root}, and {os.path.dirname(one.path)} lies elsewhere. "
                "Give another `output_dir`."
            )
        return below


def _is_replaced(row: list[str], wanted: Input) -> bool:
    return bool(row[SIZE]) and (row[SIZE], row[MODIFIED]) != (wanted.size, wanted.modified)
