"""Files in object stores and on the web, by fsspec: listed, and read whole, again where a request fails."""

from __future__ import annotations

import os
import random
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from diffad.installation import needs_extra
from diffad.reading.input_file import Input
from diffad.reading.inputs import DRIFT_NAME, PICTURE_FOLDERS, SHEET_NAME, holds_results, is_image_name, is_input_folder

TRIES = 6
FIRST_PAUSE = 0.25  # seconds before the second try; each pause is twice the one before, give or take a half
TIMEOUT = 60.0  # seconds for a file, where the file system lets it be bounded
STORE_WORKERS = 16  # threads that read from a store or write to it, which takes long to answer each

Result = TypeVar("Result")


def is_url(path: str | os.PathLike) -> bool:
    return "://" in os.fspath(path)


@contextmanager
def open_remote(url: str, mode: str = "rb") -> Iterator[Any]:
    """A file by its URL, or a local one, in bytes."""
    if not is_url(url):  # fsspec would take a `::` in its name for a chain of URLs
        with open(url, mode) as opened:
            yield opened
        return
    with needs_extra("remote", "train"):
        import fsspec
    file = fsspec.open(url, mode, **({"newline": "", "encoding": "utf-8-sig"} if "b" not in mode else {}))
    opened = Requests().make(file.__enter__)
    try:
        yield opened
    finally:
        file.close()


def describe_remote(url: str) -> tuple[str, str, str]:
    """A file's URL, size, and what its store says of its contents: a digest or a time."""
    with needs_extra("remote", "train"):
        from fsspec.core import url_to_fs
    files, path = url_to_fs(url)
    return (url, *_size_and_change(Requests().make(lambda: files.info(path))))


def _size_and_change(info: dict[str, Any]) -> tuple[str, str]:
    changed = next((info[key] for key in ("ETag", "etag", "LastModified", "mtime") if info.get(key)), "")
    return str(info.get("size") or ""), str(changed)


def list_remote(url: str, output: str | None = None) -> list[Input]:
    """The image files at a URL and below, sorted, by the rule of `diffad.reading.inputs`; none where there are none.

    The folder `output`, which may lie below, is left out, and what predict has written into any.
    Their `modified` is what the store says of their contents: a digest or a time.

    Raises:
        FailedRequestsError: the store gives no list.
        FileNotFoundError: a web server knows no such address.
    """
    return [
        Input(place, place, *_size_and_change(info))
        for place, info in _files_below(url, output)
        if is_image_name(os.path.basename(place))
    ]


def list_parquet(url: str) -> list[str]:
    """The parquet files below a URL, sorted."""
    return [place for place, _ in _files_below(url) if place.lower().endswith(".parquet")]


def _files_below(url: str, output: str | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """URL and description of each file at a URL and below, sorted, without folders that hold no inputs."""
    if "::" in re.sub(r"^(simplecache|filecache|blockcache)::", "", url):  # names in an archive lack what holds it
        raise ValueError(f"`images`: {url} is a chain of URLs, which is not listed. Give a manifest of its images.")
    with needs_extra("remote", "train"):
        from fsspec.core import url_to_fs
    files, path = url_to_fs(url)
    protocol = url.split("://")[0]
    files.invalidate_cache()  # as it is now
    # of the web, fsspec would take a folder that it cannot list for an empty one
    more = {"on_error": "raise"} if protocol in ("http", "https") else {}
    try:
        found = Requests().make(lambda: files.find(path, detail=True, **more))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"`images`: there is no file or folder at {url}.") from error
    except FailedRequestsError as error:
        raise FailedRequestsError(f"`images`: {url} cannot be listed ({error}).") from error
    own = _results_among(found)
    if output is not None and output.split("://")[0] == protocol:
        left_out = f"{url_to_fs(output)[1]}/"
        own += (left_out,) if left_out.startswith(f"{path.rstrip('/')}/") and left_out.rstrip("/") != path else ()
    # with its host or root, which the store's own names may lack
    begin = url.rstrip("/") if path.strip("/") else url
    for name, info in sorted(found.items()):
        below = name[len(path) :].lstrip("/")
        *folders, _ = below.split("/")
        if not all(map(is_input_folder, folders)) or name.startswith(own):
            continue
        if is_url(name):
            yield name, info
        elif not name.startswith(path):
            yield f"{protocol}://{name.lstrip('/')}", info
        else:
            yield f"{begin}{'/' if below and not begin.endswith('/') else ''}{below}", info


def _results_among(names: Iterable[str]) -> tuple[str, ...]:
    """How the names begin that predict has written beside a table of scores."""
    tables: dict[str, set[str]] = {}
    for name in names:
        if name.endswith((".csv", "/settings.json")):
            folder, _, last = name.rpartition("/")
            tables.setdefault(folder, set()).add(last)
    own = [*(f"{name}/" for name in PICTURE_FOLDERS), SHEET_NAME, DRIFT_NAME]
    return tuple(f"{folder}/{name}" for folder, beside in tables.items() if holds_results(beside) for name in own)


class FailedRequestsError(OSError):
    """Every try has failed."""


class Requests:
    """Requests to stores, made again where they fail, from any number of threads.

    Attributes:
        retried: requests that were made again.
    """

    def __init__(self) -> None:
        self.retried = 0
        self._lock = threading.Lock()

    def make(self, request: Callable[[], Result]) -> Result:
        """What `request` gives.

        Raises:
            FailedRequestsError: every try has failed.
            FileNotFoundError: the store knows no such file or bucket.
            ImportError: the store's package is not whole.
            PermissionError: the store does not allow it.
        """
        for i in range(TRIES):
            if i:
                with self._lock:
                    self.retried += 1
                time.sleep(FIRST_PAUSE * 2.0 ** (i - 1) * random.uniform(0.5, 1.5))
            try:
                return request()
            except (ImportError, PermissionError):  # another try would end as this one
                raise
            except FileNotFoundError as error:
                cause = error.__cause__
                # fsspec gives it of whatever a web server answers, huggingface_hub of a repository that is not there
                response = getattr(cause, "response", None)
                answer = getattr(cause, "status", None) or getattr(response, "status_code", None)
                is_final = answer < 500 if answer else not isinstance(cause, OSError)
                if is_final:
                    raise
                failure = cause
            except Exception as error:  # which one depends on the store and on how far the request came
                failure = error
        reason = f"{TRIES} requests failed, the last by {type(failure).__name__}: {failure}"
        raise FailedRequestsError(reason) from failure


def bounded(files: Any, method: str, *arguments: Any, timeout: float = TIMEOUT, **more: Any) -> Any:
    """What a method of a file system gives, after at most `timeout` seconds where it lets them be bounded."""
    if files.async_impl:
        from fsspec.asyn import sync

        return sync(files.loop, getattr(files, f"_{method}"), *arguments, timeout=timeout, **more)
    return getattr(files, method)(*arguments, **more)
