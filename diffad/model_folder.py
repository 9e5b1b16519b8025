"""Where commands write a model or results."""

from __future__ import annotations

import re
from pathlib import Path
from tempfile import TemporaryFile

MODEL_LOCK_NAME = ".diffad-training.lock"  # of what trains or updates a model, in its folder


def check_local(path: str | Path) -> None:
    """Raises a ValueError for a URL, which would become the name of a local folder, and for an empty text."""
    if not str(path):
        raise ValueError("The output is an empty path. Is a variable of the shell not set?")
    if re.match(r"[a-z][a-z0-9+.-]+:/", str(path), re.IGNORECASE):  # `Path` has taken one of the two strokes away
        raise ValueError(
            f"Only `diffad predict` writes to a URL, given as text, and {path} is one. Give a local file or folder, "
            "and copy it when the run has ended, by the store's own program or by fsspec's `put`."
        )


def check_writable(folder: Path) -> None:
    """Makes sure that files can be written to a folder, or to what is there of it: before all the work.

    Raises:
        ValueError: a file stands there or above.
        OSError: nothing can be written there.
    """
    there = next(one for one in (folder.absolute(), *folder.absolute().parents) if one.exists())
    if not there.is_dir():
        raise ValueError(f"The output goes into a folder, but {there} is a file. Give another one.")
    try:
        with TemporaryFile(dir=there) as probe:
            probe.write(bytes(4096))
            probe.flush()
    except OSError as error:
        why = f"nothing can be written to {there} ({error.strerror})"
        raise OSError(f"`output`: {why}. Free space there, or give another.") from error


def check_folder(path: Path) -> Path:
    """`path`, unless it is a URL, or a file stands there or above, of which diffusers says nothing.

    Raises:
        ValueError: one of both.
        OSError: nothing can be written there.
    """
    check_local(path)
    check_writable(path)
    return path


def check_model_folder(path: Path) -> Path:
    """`path`, unless it is a folder of images: beside a model they would be no inputs any more."""
    from diffad.reading.inputs import list_folder

    check_folder(path)
    if path.is_dir() and (images := list_folder(path).files):
        raise ValueError(
            f"`output`: {path} holds images, {images[0].name} first, which no command would take any more with a model "
            "between them. Give another folder."
        )
    return path
