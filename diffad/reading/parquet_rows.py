"""Rows of parquet files that hold images, as data sets on the Hub have them: structs with `bytes` and `path`."""

from __future__ import annotations

import re
import threading
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from itertools import accumulate
from typing import Any

from diffad.installation import needs_extra
from diffad.reading.remote_files import is_url, open_remote

NAMES_AT_ONCE = 65_536  # rows, of which the names alone are read
_ROW = re.compile(r"(.*)#row=(\d+)/.*", re.DOTALL)
_LOCK = threading.Lock()  # pyarrow reads a file from one thread at a time


@contextmanager
def open_parquet(path: str) -> Iterator[Any]:
    with needs_extra("remote", "train"):
        from pyarrow import parquet
    with open_remote(path) as opened:
        try:
            file = parquet.ParquetFile(opened)
        except ValueError as error:  # pyarrow's, which names no file
            raise ValueError(f"`images`: {path} is no parquet file, or not all of one ({error}).") from error
        with file:
            yield file


@lru_cache(maxsize=1000)
def image_column(path: str) -> str | None:
    """The column whose values have `bytes` and a `path`; of several, as with masks, the one that is called `image`.

    Raises:
        ValueError: there are several, and none is called so.
    """
    with open_parquet(path) as file:
        fields = [(field.name, getattr(field.type, "fields", ())) for field in file.schema_arrow]
    found = [name for name, inner in fields if {"bytes", "path"} <= {one.name for one in inner}]
    found.sort(key=lambda name: (name.strip().lower() != "image", name != "image"))
    if len(found) > 1 and found[0].strip().lower() != "image":
        raise ValueError(f"`images`: {path} has several columns of images, {found}. Name the one to take 'image'.")
    return found[0] if found else None


def row_urls(path: str) -> Iterator[str]:
    """Where each image of a parquet file is, as `read_row` reads it."""
    url, row = path if is_url(path) else f"file://{path}", 0
    with open_parquet(path) as file:
        for batch in file.iter_batches(NAMES_AT_ONCE, columns=[f"{image_column(path)}.path"]):
            for image in batch.column(0).to_pylist():
                yield f"{url}#row={row}/{(image or {}).get('path') or row}"
                row += 1


def is_row(url: str) -> bool:
    return _ROW.fullmatch(url) is not None


def read_row(url: str) -> bytes:
    """The bytes of an image that `row_urls` names."""
    path, row = _ROW.fullmatch(url).groups()  # type: ignore[union-attr]
    with _LOCK:
        ends = _group_ends(path)
        group = bisect_right(ends, int(row))
        images = _row_group(path, group)
        image = images[int(row) - (ends[group - 1] if group else 0)].as_py() or {}  # a row may have none
        return image.get("bytes") or b""


@lru_cache(maxsize=1000)
def _group_ends(path: str) -> list[int]:
    with open_parquet(path) as file:
        sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
    return list(accumulate(sizes))


@lru_cache(maxsize=2)
def _row_group(path: str, group: int) -> Any:
    with open_parquet(path) as file:
        return file.read_row_group(group, columns=[image_column(path)]).column(0)
