"""What an input is: the one rule by which every command finds images in folders.

An image is a file whose name ends as Pillow's formats do. Links to files and folders are followed, a link back into a
folder is noticed, and a file that has several names counts once, under the first of them in sorted order. No inputs
are: names that begin with a dot; folders that other programs leave behind (`__MACOSX`, `@eaDir`, ...); and what diffad
itself has written. A file or folder that is named outright is taken whatever its name.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

from PIL import Image

SERVICE_FOLDERS = {
    "__macosx",  # macOS, from archives
    "@eadir",  # Synology
    "@recycle",  # QNAP
    "#recycle",
    "#snapshot",
    "$recycle.bin",  # Windows
    "system volume information",
    "lost+found",
    "__pycache__",
}

# formats that Pillow only recognises, that take another program, or that are no pictures of a part
NO_PICTURES = {"EPS", "WMF", "MPEG", "HDF5", "GRIB", "BUFR", "PDF", "ICO", "CUR", "ICNS"}

LOCK_NAME = ".diffad.lock"  # stands in every folder that predict has written to

PICTURE_FOLDERS, SHEET_NAME = ("overlays", "maps", "masks"), "most_anomalous.png"
DRIFT_NAME = "drift.png"
OWN_NAMES = (*PICTURE_FOLDERS, SHEET_NAME, DRIFT_NAME)  # no inputs, beside results
# files that tell a folder of results or of a model, see `holds_results` and `_holds_model`
MARKS = [LOCK_NAME, "settings.json", "scores.csv", "scores.partial.csv"]
MARKS += ["model_index.json", "config.json", "training.json"]
REPORT_SHEETS = ("-defective.png", "-good.png")  # of an evaluation: behind the name of its report, no inputs beside it


@cache
def image_suffixes() -> frozenset[str]:
    """Endings of image files' names, in lower case, as the installed Pillow reads them."""
    known = Image.registered_extensions()
    readable = {suffix for suffix, name in known.items() if name in Image.OPEN and name not in NO_PICTURES}
    return frozenset(readable | {".jfif", ".mpo"})  # read as JPEG


def describe_suffixes() -> str:
    """For messages."""
    usual = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp", ".gif")
    return f"{', '.join(usual)} (or other)"


def is_image_name(name: str) -> bool:
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in image_suffixes()


def is_input_folder(name: str) -> bool:
    """Whether a folder of this name, found in another, may hold inputs."""
    return not name.startswith(".") and name.lower() not in SERVICE_FOLDERS


class Folder(NamedTuple):
    """A folder as it was listed, without what is no input."""

    key: tuple[int, int]  # the same for all its names
    files: list[os.DirEntry[str]]  # images; a link may lead nowhere
    folders: list[os.DirEntry[str]]


def list_folder(folder: str | Path) -> Folder:
    """What is in a folder.

    Raises:
        OSError: it cannot be listed.
    """
    status = os.stat(folder)
    with os.scandir(folder) as listed:
        entries = sorted(listed, key=lambda entry: entry.name)
    names = {entry.name for entry in entries}
    own = _own_names(names)
    if _holds_model(names):  # its pictures are those of training and evaluation
        own |= {entry.name for entry in entries if not _is_folder(entry)}
    entries = [entry for entry in entries if entry.name not in own]
    folders = [entry for entry in entries if is_input_folder(entry.name) and _is_folder(entry)]
    files = [entry for entry in entries if is_image_name(entry.name) and not _is_folder(entry)]
    files = [entry for entry in files if entry.is_symlink() or entry.is_file(follow_symlinks=False)]
    return Folder((status.st_dev, status.st_ino), files, folders)


def is_own(folder: str | Path, name: str) -> bool:
    """Whether diffad has written what bears a name in a folder, so that it is no input: without a listing of it.

    It agrees with `list_folder`, but for what lies beside a training's checkpoints.
    """
    stems = {name.removesuffix(ending) for ending in REPORT_SHEETS if name.endswith(ending)}
    asked = {*MARKS, *(stem + ending for stem in stems for ending in (".html", ".json"))}
    names = {name, *(one for one in asked if os.path.lexists(os.path.join(folder, one)))}
    return name in _own_names(names) or (_holds_model(names) and not os.path.isdir(os.path.join(folder, name)))


def _own_names(names: set[str]) -> set[str]:
    """Names of what diffad writes into a folder of these names, which tell what it is."""
    results = set(OWN_NAMES) if holds_results(names) else set()
    return _report_sheets(names) | results | ({"validation"} if _holds_model(names) else set())


def _is_folder(entry: os.DirEntry[str]) -> bool:
    # an entry's own `is_dir` raises on a link to itself
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()


def holds_results(names: set[str]) -> bool:
    """Whether predict has written to a folder of these names; in a store there is no lock."""
    return LOCK_NAME in names or ("settings.json" in names and bool({"scores.csv", "scores.partial.csv"} & names))


def _report_sheets(names: set[str]) -> set[str]:
    """The pictures of evaluations whose reports, X.json and X.html, are among these names."""
    stems = {os.path.splitext(name)[0] for name in names if name.endswith(".html")}
    return {stem + ending for stem in stems if f"{stem}.json" in names for ending in REPORT_SHEETS} & names


def _holds_model(names: set[str]) -> bool:
    if "model_index.json" in names or {"config.json", "training.json"} <= names:  # the latter of an autoencoder
        return True  # a training.json alone may be somebody's annotations
    return any(re.fullmatch(r"(unfinished-)?checkpoint-\d+", name) for name in names)


class _Walk:
    """Goes through folders, and remembers which folders and files it has seen."""

    def __init__(self, left_out: str | None = None):
        self.left_out = left_out  # a folder, resolved
        self.folders: set[tuple[int, int]] = set()
        self.files: set[tuple[int, int, str]] = set()
        self.dangling: list[Path] = []

    def is_new(self, folder: tuple[int, int], name: str) -> bool:
        key = (*folder, os.path.normcase(name))
        if key in self.files:
            return False
        self.files.add(key)
        return True

    def is_new_file(self, path: str | Path) -> bool:
        """By any name of a file: what it is called in its own folder decides."""
        folder, name = os.path.split(os.path.realpath(path))
        status = os.stat(folder)
        return self.is_new((status.st_dev, status.st_ino), name)

    def images(self, folder: Path) -> Iterator[Path]:
        """Images below `folder` that were not seen before, sorted as paths are: name by name."""
        waiting: list[tuple[Path, tuple[int, int] | None, os.DirEntry[str] | None]] = [(folder, None, None)]
        while waiting:  # not by recursion, whose depth is bounded
            path, parent, entry = waiting.pop()
            if entry is not None and parent is not None:
                if not entry.is_symlink():
                    if self.is_new(parent, entry.name):
                        yield path
                elif not os.path.isfile(path):
                    self.dangling.append(path)
                elif self.is_new_file(path):
                    yield path
                continue
            try:
                listed = list_folder(path)
            except OSError as error:
                warnings.warn(f"{path} cannot be listed ({error.strerror}): it is left out.", stacklevel=4)
                continue
            if listed.key in self.folders:
                continue  # a loop, or another name of a folder that was seen
            if self.left_out is not None and os.path.realpath(path) == self.left_out and path != folder:
                continue
            self.folders.add(listed.key)
            files = [(path / one.name, listed.key, one) for one in listed.files]
            folders = [(path / one.name, None, None) for one in listed.folders]
            waiting += sorted([*files, *folders], key=lambda item: item[0].name, reverse=True)

    def warn(self) -> None:
        if self.dangling:
            more = f" and {len(self.dangling) - 1} more" if len(self.dangling) > 1 else ""
            warnings.warn(f"Links that lead to no file are left out: {self.dangling[0]}{more}.", stacklevel=4)


def images_below(folder: str | Path) -> list[Path]:
    """The images below a folder, sorted, each once; none if there is no such folder."""
    folder = Path(folder)
    if not folder.is_dir():
        return []
    walk = _Walk()
    found = list(walk.images(folder))
    walk.warn()
    return found


def subfolders(folder: str | Path) -> list[Path]:
    """The folders in a folder that may hold inputs, sorted; not those that hold nothing but files of diffad's."""
    found = [Path(folder, entry.name) for entry in list_folder(folder).folders]
    return [one for one in found if not _is_output(one)]


def _is_output(folder: Path) -> bool:
    try:
        names = set(os.listdir(folder))
    except OSError:
        return False
    return bool(holds_results(names) or _holds_model(names) or _report_sheets(names)) and not images_below(folder)


def find_images(paths: Sequence[str | Path], output_dir: str | Path | None = None) -> list[Path]:
    """Image files among `paths` and below the folders in it, in order, each once, whatever the spelling.

    `output_dir` is left out where it lies below one of them, and what an earlier run has written into it is left
    out anywhere: these pictures are no inputs of the next.

    Raises:
        FileNotFoundError: a path does not exist.
        ValueError: there are no images.
    """
    if any(os.fspath(path) == "" for path in paths):  # `Path` would take it for the working folder
        raise ValueError("`images`: one of the paths is empty. Is a variable of the shell not set?")
    left_out = None if output_dir is None else os.path.realpath(output_dir)
    walk = _Walk(left_out)
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            found += walk.images(path)
        elif path.is_file():
            if walk.is_new_file(path):
                found.append(path)
        else:
            raise FileNotFoundError(f"There is no file or folder at {path}.")
    walk.warn()
    if left_out is not None:
        own = [os.path.join(left_out, name) for name in OWN_NAMES]
        if os.path.isdir(left_out) and holds_results(set(os.listdir(left_out))):
            found = [path for path in found if not _is_below(os.path.realpath(path), own)]
    if not found:
        but = "" if output_dir is None else f" What {output_dir} got from an earlier run does not count."
        raise ValueError(f"There are no images ({describe_suffixes()}) in {', '.join(map(str, paths))}.{but}")
    return found


def _is_below(path: str, folders: Sequence[str]) -> bool:
    return any(path == folder or path.startswith(folder + os.sep) for folder in folders)


def absolute_place(path: str | Path) -> Path:
    """A path from the root on, without `..`: resolved up to its last `..`, then link by link as it was spelled.

    Cutting out `..` as text would lead elsewhere where a link stands before it.
    """
    path = Path(os.path.realpath(os.curdir), path)
    last = max((i for i, part in enumerate(path.parts) if part == os.pardir), default=None)
    if last is None:
        return path
    return Path(os.path.realpath(Path(*path.parts[: last + 1])), *path.parts[last + 1 :])
