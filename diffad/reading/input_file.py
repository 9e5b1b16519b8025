"""An input of a run: a file as it was before it was read, and its place among the others."""

from __future__ import annotations

import os
import posixpath
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from diffad.reading.inputs import absolute_place


class Input(NamedTuple):
    """An image file, as it was before it was read.

    path: as it was given: a `Path`, or a URL as text.
    file: with every link resolved: two names of a file have one. "" where a manifest's line names none.
    size: in bytes; "" where there is no file.
    modified: nanoseconds since 1970, with the former what tells a file from another one of its name.
    """

    path: Any
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


def distinct_inputs(paths: Sequence[Path | Input]) -> list[Input]:
    """Each file once, under the first of its names; those in a store come as an `Input`."""
    found: dict[str, Input] = {}
    for path in paths:
        described = path if isinstance(path, Input) else describe_input(Path(path))
        found.setdefault(os.path.normcase(described.file), described)
    return list(found.values())


def common_folder(inputs: Sequence[Input]) -> str:
    """The folder that all inputs lie below.

    Raises:
        ValueError: there is none, as they lie on several drives.
    """
    urls = [one.path for one in inputs if isinstance(one.path, str)]
    if urls:
        protocols = {url.split("://")[0] for url in urls}
        if len(protocols) > 1 or len(urls) < len(inputs):
            raise ValueError("The images lie in several stores. Give those of each an `output_dir` of its own.")
        protocol = protocols.pop()
        return f"{protocol}://{posixpath.commonpath([posixpath.dirname(url.split('://')[1]) for url in urls])}"
    try:
        return os.path.commonpath({str(absolute_place(one.path).parent) for one in inputs})
    except ValueError as error:
        raise ValueError(
            "The images lie on several drives. Give those of each drive an `output_dir` of its own."
        ) from error


def place_below(root: str, path: Path | str) -> Path | None:
    """A file's place below `root`, by its own path or by that with all links resolved; None if it lies elsewhere."""
    if isinstance(path, str) and "://" in path:
        above = root if root.endswith("/") else f"{root}/"  # of several buckets it is the protocol alone
        return Path(path[len(above) :]) if path.startswith(above) else None
    for one, folder in ((absolute_place(path), root), (os.path.realpath(path), os.path.realpath(root))):
        if Path(one).is_relative_to(folder):
            return Path(one).relative_to(folder)
    return None
