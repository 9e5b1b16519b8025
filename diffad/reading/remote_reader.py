"""Reads images by the URLs that tell where they are: a file, a part of one, a row of a parquet file."""

from __future__ import annotations

import re

from diffad.installation import needs_extra
from diffad.reading.grey_depth import UnreadableImageError
from diffad.reading.input_file import Input
from diffad.reading.parquet_rows import is_row, read_row
from diffad.reading.remote_files import FailedRequestsError, Requests, bounded, is_url

_PART = re.compile(r"(.*?)(?:#bytes=(\d+)-(\d+)/.*)?", re.DOTALL)


def part_of(path: str, start: int, size: int, name: str) -> str:
    """A URL of `size` bytes of a file, from `start` on, which are called `name`."""
    url = path if is_url(path) else f"file://{path}"
    return f"{url}#bytes={start}-{start + size}/{name}"


class RemoteReader(Requests):
    """Reads files by their URLs."""

    def __call__(self, one: Input) -> bytes | None:
        """An input's bytes; None of a local file, which is read where it is.

        Raises:
            FileNotFoundError: the store knows no such file, or does not show it.
            ImportError: the package of such stores is not installed.
            UnreadableImageError: every try has failed, or a row of a parquet file has a path without bytes.
        """
        if not is_url(one.path):
            return None
        url = str(one.path)
        try:
            content = self.make(lambda: _fetch(url))
        except (FileNotFoundError, PermissionError) as error:
            raise FileNotFoundError(f"`image`: no file at {url} ({error}).") from error
        except FailedRequestsError as error:
            raise UnreadableImageError(f"`image`: {url} cannot be read ({error}).", str(error)) from error
        if is_row(url) and not content:
            reason = "the row has no bytes of an image, and a path at most: give a column of paths instead, as strings"
            raise UnreadableImageError(f"`image`: {url} cannot be read ({reason}).", reason)
        return content


def _fetch(url: str) -> bytes:
    if is_row(url):
        return read_row(url)
    with needs_extra("remote", "train"):
        from fsspec.core import url_to_fs
    url, start, end = _PART.fullmatch(url).groups()  # type: ignore[union-attr]  # it matches any text
    files, path = url_to_fs(url)
    part = {} if start is None else {"start": int(start), "end": int(end)}
    return bounded(files, "cat_file", path, **part)
