"""The output of `diffad predict` in an object store.

The store holds what is done. Each process of a run works in a temporary folder of its own, as in an output on its
disk, and what it writes there goes up: a picture at once, and is then removed; rows and regions every half a minute, as
a store has no append, in segments that are never changed. The main process takes them up again, as it does journals,
and makes the tables. So the next run goes on on any machine, with any number of processes. A store has no lock either:
one run at a time may write to a URL.
"""

from __future__ import annotations

import secrets
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffad.installation import needs_extra
from diffad.model_folder import check_local
from diffad.prediction.journal import CALIBRATION_NAME, JOURNAL_COLUMNS, JOURNAL_NAME, SCORES_NAME, process_journal
from diffad.prediction.output_folder import SETTINGS_NAME, check_names
from diffad.prediction.region_files import region_journal
from diffad.process_share import GO_ON, on_main
from diffad.reading.remote_files import STORE_WORKERS, TIMEOUT, Requests, bounded, is_url

if TYPE_CHECKING:
    from accelerate import Accelerator

SEGMENT_SECONDS = 30.0  # between two segments of a process: what a killed one loses
SLOWEST = 1e6  # bytes a second; what goes up no faster is given up and tried again
LONGEST = 3600.0  # seconds for a file that comes down, whose size nobody has asked for
STATE = (SETTINGS_NAME, SCORES_NAME, "scores.partial*.csv", "regions*.jsonl")  # what a run goes on from
HEADER = (",".join(JOURNAL_COLUMNS) + "\r\n").encode()  # of a process's rows, as `csv` writes it


def output_place(output: str | PathLike) -> Path | str:
    """A local folder, or the URL of one in a store, without a stroke at its end.

    Raises:
        ImportError: the store's package is not installed.
        ValueError: nobody can write there, or fsspec knows no such store.
    """
    if not is_url(output):
        check_local(fspath(output))
        return Path(output)
    url = fspath(output).rstrip("/")
    protocol, _, place = url.partition("://")
    if not place:
        raise ValueError(f"`output_dir`: {output} names no folder. Give a bucket, as in s3://bucket/found.")
    if protocol in ("http", "https"):
        raise ValueError(f"`output_dir`: nothing can be written to {url}. Give a folder, or a store's URL as s3://...")
    with needs_extra("remote", "train"):
        from fsspec.core import url_to_fs
    try:
        path = url_to_fs(url)[1]
    except ImportError as error:
        raise ImportError(f"`output_dir`: {url} needs another package. {error}") from error
    except Exception as error:  # which one depends on the store
        raise ValueError(f"`output_dir`: {url} is in no store that can be written to ({error}).") from error
    return Path(path) if protocol in ("file", "local") else url


def check_store(url: str) -> None:
    """Raises an OSError where a store does not answer, or not for us; it costs one request."""
    with RemoteOutput(url) as output:
        output.listed()


class LocalOutput:
    """An output on this machine's disk: what is written to `folder` stays there.

    Attributes:
        folder: to write to.
        is_far: whether it is a store's.
        retried: requests that were made again.
        segments: names of the files that hold this process's rows, where they are not in `folder`.
    """

    is_far = False
    retried: float = 0

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.segments: list[str] = []

    def push(self) -> None:
        """Brings to the store what has become of `folder`: by the main process, while no other writes rows."""

    def send(self, name: str) -> None:
        """Brings a picture to the store, and takes it out of `folder`; from any thread."""

    def send_rows(self, pool: Executor) -> None:
        """Brings new rows to the store, by `pool`, where it is time; called when whole rows are on the disk."""

    @contextmanager
    def all_rows(self) -> Iterator[None]:
        """However the block ends, its rows are in the store when it has."""
        yield

    def collect(self, segments: Iterable[str]) -> None:
        """Fetches the segments of all processes, which the next `push` removes from the store where they are merged."""

    def fetch(self, names: Iterable[str]) -> None:
        """Fetches files that are in the store."""


class RemoteOutput(LocalOutput):
    """An output in a store, and a temporary folder, which a context ends.

    Args:
        url: without a stroke at its end.
        process: whose rows are sent.
    """

    is_far = True

    def __init__(self, url: str, process: int = 0):
        from fsspec.core import url_to_fs

        self._temporary = tempfile.TemporaryDirectory(prefix="diffad-")
        super().__init__(self._temporary.name)
        self.url = url
        self._files, self._path = url_to_fs(url)
        self._requests = Requests()
        self._stored: dict[str, Any] = {}  # what is known to be there, and which file in `folder` is the same
        # by journal, what each segment begins with and how far it was sent; regions first: a row says that all is done
        self._headers = {region_journal(self.folder, process): b"", process_journal(self.folder, process): HEADER}
        self._sent = {path: len(header) for path, header in self._headers.items()}
        self._token = secrets.token_hex(4)  # of a run that was thought dead no segment is replaced
        self._number = 0
        self._due = time.monotonic() + SEGMENT_SECONDS
        self._sending: Future | None = None

    def __enter__(self) -> RemoteOutput:
        return self

    def __exit__(self, *error: object) -> None:
        self._temporary.cleanup()

    @property
    def retried(self) -> float:  # type: ignore[override]  # of a local one it is a constant
        return self._requests.retried

    def listed(self) -> set[str]:
        """Names of the files and folders there; none where nothing is."""
        self._files.invalidate_cache()  # as it is now
        try:
            entries = self._request("read", "", "ls", self._path, detail=True)
        except FileNotFoundError:
            return set()
        names = {entry["name"][len(self._path) :].strip("/") for entry in entries if not entry["name"].endswith("/")}
        if "" in names:
            raise ValueError(f"`output_dir` must be a folder, but {self.url} is a file.")
        return names

    def pull(self) -> None:
        """Fetches what the next run goes on from, and no pictures.

        Raises:
            OSError: the store does not answer, or not for us.
            ValueError: files of another program's would be replaced.
        """
        names = self.listed()
        check_names(names, self.url)
        self._each(self._get, [name for name in names if any(fnmatch(name, one) for one in STATE)])

    def push(self) -> None:
        paths = [path for path in sorted(self.folder.iterdir()) if path.is_file() and not path.name.startswith(".")]
        changed = [path for path in paths if self._stored.get(path.name) != _state(path)]
        with _what_to_do():
            for path in sorted(changed, key=lambda path: path.name == SCORES_NAME):  # which says that all is there
                self._put(path.name)
                self._stored[path.name] = _state(path)
            removed = [name for name in self._stored if not (self.folder / name).exists()]
            # only now, as others hold what was in them; and first the journal, beside which `scores.csv` does not count
            for names in ([JOURNAL_NAME] if JOURNAL_NAME in removed else [], set(removed) - {JOURNAL_NAME}):
                self._each(self._remove, sorted(names))

    def send(self, name: str) -> None:
        try:
            self._put(name)
        finally:
            (self.folder / name).unlink()

    def send_rows(self, pool: Executor) -> None:
        if self._sending is not None and self._sending.done():
            self._sending.result()
            self._sending = None
        if self._sending is None and time.monotonic() >= self._due:
            self._due = time.monotonic() + SEGMENT_SECONDS
            self._sending = pool.submit(self._send_segment, self._ends())

    @contextmanager
    def all_rows(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            with suppress(OSError):  # the first error is the one to tell
                self._send_segment(self._ends())
            raise
        self._send_segment(self._ends())

    def collect(self, segments: Iterable[str]) -> None:
        all_of_them = list(segments)
        self._each(self._get, [name for name in all_of_them if name not in self.segments])  # its own rows are here
        self._stored |= dict.fromkeys(all_of_them)

    def fetch(self, names: Iterable[str]) -> None:
        def get(name: str) -> None:
            with suppress(FileNotFoundError):  # somebody may have taken it away
                self._get(name)

        self._each(get, list(names))

    def _ends(self) -> dict[Path, int]:
        return {path: path.stat().st_size if path.is_file() else self._sent[path] for path in self._headers}

    def _send_segment(self, ends: dict[Path, int]) -> None:
        """What the journals hold up to `ends` and no segment before."""
        new = {path: end for path, end in ends.items() if end > self._sent[path]}
        names = []
        for path, end in new.items():
            with open(path, "rb") as file:
                file.seek(self._sent[path])
                content = self._headers[path] + file.read(end - self._sent[path])
            names.append(f"{path.stem}-{self._token}-{self._number:06}{path.suffix}")
            with _what_to_do():
                self._request(
                    "written", names[-1], "pipe_file", self._at(names[-1]), content, limit=_limit(len(content))
                )
        self._sent |= new  # of neither where one has failed: they are sent again together
        self.segments += names
        self._number += 1

    def _put(self, name: str) -> None:
        path = self.folder / name
        self._request("written", name, "put_file", str(path), self._at(name), limit=_limit(path.stat().st_size))

    def _get(self, name: str) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        self._request("read", name, "get_file", self._at(name), str(path), limit=LONGEST)
        self._stored[name] = _state(path)

    def _remove(self, name: str) -> None:
        with suppress(FileNotFoundError):
            self._request("removed", name, "rm_file", self._at(name))
        del self._stored[name]

    def _at(self, name: str) -> str:
        return f"{self._path}/{name}"

    def _request(self, done: str, name: str, method: str, *arguments: Any, limit: float = TIMEOUT, **more: Any) -> Any:
        """What a method of the store's file system gives; an error says that `name` cannot be `done`."""
        try:
            return self._requests.make(lambda: bounded(self._files, method, *arguments, timeout=limit, **more))
        except (ImportError, OSError) as error:
            if isinstance(error, FileNotFoundError) and done != "written":  # else there is no such bucket
                raise
            url = f"{self.url}/{name}".rstrip("/")
            raise OSError(f"`output_dir`: {url} cannot be {done} ({error}).") from error

    def _each(self, work: Callable[[str], None], names: Sequence[str]) -> None:
        with ThreadPoolExecutor(STORE_WORKERS) as pool:
            for _ in pool.map(work, names):
                pass


def _limit(size: int) -> float:
    """Seconds for so many bytes to go up."""
    return TIMEOUT + size / SLOWEST


def _state(path: Path) -> tuple[int, int, int]:
    """Another one where a file has been replaced."""
    status = path.stat()
    return status.st_ino, status.st_mtime_ns, status.st_size


@contextmanager
def _what_to_do() -> Iterator[None]:
    """Adds to what failed for good, and ends a run, what is to be done."""
    try:
        yield
    except OSError as error:
        raise OSError(f"{error} Look at the bucket, the keys and the endpoint. {GO_ON}") from error


@contextmanager
def opened_output(output: str | PathLike, accelerator: Accelerator | None) -> Iterator[LocalOutput]:
    """An output that is ready to be planned in, with what earlier runs have left there.

    Raises:
        ImportError, OSError, ValueError: as of `output_place` and `RemoteOutput.pull`.
    """
    place = output_place(output)
    if isinstance(place, Path):
        yield LocalOutput(place)
        return
    with RemoteOutput(place, 0 if accelerator is None else accelerator.process_index) as opened:
        on_main(accelerator, opened.pull)
        try:
            yield opened
        except ValueError as error:
            if (temporary := str(opened.folder)) not in str(error):
                raise
            raise ValueError(str(error).replace(temporary, place)) from error  # nobody knows the former


def is_there(place: Path | str, name: str) -> bool:
    """Whether a file is in an output; a store is asked once."""
    if isinstance(place, Path):
        return (place / name).is_file()
    with RemoteOutput(place) as output:
        return name in output.listed()


@contextmanager
def tables_of(place: Path | str) -> Iterator[Path]:
    """A folder with a complete output's tables of scores; what is added to it is in the output when the block ends."""
    if isinstance(place, Path):
        yield place
        return
    with RemoteOutput(place) as output:
        output.fetch((SCORES_NAME, CALIBRATION_NAME))
        yield output.folder
        output.push()
