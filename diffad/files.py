"""Files that are whole or not there, names that every file system takes, and locks that the kernel keeps."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAME_BYTES = 200  # file systems take 255, some encrypted ones 143 of them for names that are short enough


def digest(name: str) -> str:
    """Tells names apart, in 10 letters."""
    return hashlib.sha256(os.fsencode(name)).hexdigest()[:10]


def bounded_name(name: str, suffix: str = "") -> str:
    """`name` and `suffix`, as one part of a path, in at most 200 bytes; what was cut tells itself apart by a digest."""
    if len(os.fsencode(name + suffix)) <= NAME_BYTES:
        return name + suffix
    tail = f"-{digest(name)}{suffix}"
    while len(os.fsencode(name + tail)) > NAME_BYTES:
        name = name[:-1]  # by letters: half of one would be no name
    return name + tail


def unfinished_path(path: Path) -> Path:
    """Where a file is written before it gets its name: beside it, hidden, and short whatever the name."""
    return path.with_name(f".unfinished-{digest(path.name)}{path.suffix if len(path.suffix) <= 8 else ''}")


@contextlib.contextmanager
def write_whole(path: Path) -> Iterator[Path]:
    """A new, empty file beside `path` to write to, which becomes `path` where the block ends without an error.

    A link that stands at `path` is replaced, and not followed. A killed process leaves a file
    `.unfinished-...`, which the next one that writes `path` takes away.
    """
    unfinished = unfinished_path(path)
    unfinished.unlink(missing_ok=True)
    os.close(os.open(unfinished, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    try:
        yield unfinished
        unfinished.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            unfinished.unlink()
        raise


def write_text_whole(path: Path, text: str) -> None:
    """Writes text in UTF-8; a name in it that is no UTF-8 keeps its bytes."""
    with write_whole(path) as unfinished:
        unfinished.write_bytes(text.encode("utf-8", "surrogateescape"))


def sync_folder(folder: Path) -> None:
    """Has the system write a folder's new names to disk; on Windows it does so by itself."""
    if os.name == "nt":
        return
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object that a file holds; an empty one where it holds none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


@contextlib.contextmanager
def locked_folder(folder: Path, lock_name: str, argument: str = "`output_dir`") -> Iterator[None]:
    """Holds a folder for this process. The kernel lets go of it when the process ends, however it ends.

    Args:
        folder: must be there.
        lock_name: of the file in it that is locked, which stays.
        argument: which names the folder, for the message.

    Raises:
        RuntimeError: another process holds it; the message names it.
    """
    path = folder / lock_name
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
    _held.add(descriptor)
    try:
        try:
            _lock(descriptor)
        except BlockingIOError:
            holder = os.pread(descriptor, 200, 0) if hasattr(os, "pread") else os.read(descriptor, 200)
            who = holder.decode("utf-8", "replace").strip() or "another process"
            raise RuntimeError(
                f"{folder} is being written to by {who}. Wait for its end, or give another {argument}."
            ) from None
        except OSError as error:
            warnings.warn(
                f"{folder} cannot be locked ({error.strerror}): let only one process write there.", stacklevel=3
            )
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        yield
    finally:
        if descriptor in _held:  # which it is not in a forked process
            _held.discard(descriptor)
            os.close(descriptor)  # and with it the lock; the file stays, as another process may wait for it by now


_held: set[int] = set()  # descriptors that hold a lock


def _close_inherited() -> None:
    """A forked process, such as one that reads images ahead, would hold a lock after the one that took it ended."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_inherited)


def _lock(descriptor: int) -> None:
    if os.name == "nt":
        import msvcrt

        position = os.lseek(descriptor, 0, os.SEEK_CUR)
        os.lseek(descriptor, 1 << 30, os.SEEK_SET)  # behind the text, which others must be able to read
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        except OSError as error:
            raise BlockingIOError(*error.args) from error
        finally:
            os.lseek(descriptor, position, os.SEEK_SET)
    else:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
