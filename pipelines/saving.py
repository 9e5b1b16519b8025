"""Models that take another's place in a folder: the old one or the new one is there, whole.

No system replaces a folder at once where users keep files of their own in it, so a model is saved in three steps:

1. It is written into `.unfinished-model/`. A failure leaves the old model as it was, and this folder is removed.
2. That folder is renamed to `.complete-model/`: from here on the new model counts.
3. Its parts are renamed into their places. The file that loading begins with (`model_index.json`) is taken away first
   and comes last, so that whoever reads meanwhile finds no model, and never parts of two.

A process that is killed in step 3 leaves the rest to the next that loads from the folder or saves to it.
"""

from __future__ import annotations

import contextlib
import filecmp
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path

UNFINISHED, COMPLETE, REPLACED = ".unfinished-model", ".complete-model", ".replaced-model"

BEGINNINGS = ("model_index.json", "config.json")  # of a pipeline, of a network
# Parts that are float32 in every variant. One configuration goes with one set of weights, which all variants share.
SHARED_PARTS = ("calibration", "tile_calibration", "gaussian")
NO_WEIGHTS = ""  # for the variant of a file that holds none


@contextlib.contextmanager
def save_whole(folder: str | os.PathLike, variant: str | None = None) -> Iterator[Path]:
    """A new folder to save a model into, whose parts take their places in `folder` where the block ends without error.

    What else is in `folder` stays; so do files in the parts' own folders, such as weights of another variant. Weights
    of this one go, and of `SHARED_PARTS` those of all variants. Where another variant loses a calibration of its own, a
    warning says so.

    Args:
        folder: is made where there is none.
        variant: of the weights' file names.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder):  # two at once would mix their parts: the second waits
        finish_saving(folder)
        unfinished = folder / UNFINISHED
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        try:
            yield unfinished
            _warn_of_other_variants(folder, unfinished, variant)
            for part in unfinished.iterdir():
                if part.is_dir() and (folder / part.name).is_dir():
                    _keep_others(folder / part.name, part, variant)
            unfinished.rename(folder / COMPLETE)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise
        finish_saving(folder)


def finish_saving(folder: str | os.PathLike) -> None:
    """Puts the parts of a model that was saved completely into their places; does nothing where all are.

    Raises:
        OSError: a part cannot be put there.
    """
    complete = Path(folder, COMPLETE)
    if not complete.is_dir():
        return
    with _alone(complete):
        if complete.is_dir():  # another process may have done it
            _put_into_place(complete, Path(folder))


def _put_into_place(complete: Path, folder: Path) -> None:
    replaced = folder / REPLACED
    replaced.mkdir(exist_ok=True)
    beginning = next((name for name in BEGINNINGS if (complete / name).is_file()), None)
    if beginning is not None and (folder / beginning).exists():
        (folder / beginning).replace(replaced / beginning)
    for part in sorted(complete.iterdir(), key=lambda part: part.name == beginning):
        place = folder / part.name
        if place.is_dir() and not place.is_symlink():
            shutil.rmtree(replaced / part.name, ignore_errors=True)
            place.rename(replaced / part.name)
        part.replace(place)
    complete.rmdir()
    shutil.rmtree(replaced, ignore_errors=True)


def _keep_others(old: Path, new: Path, variant: str | None) -> None:
    """Puts into `new` what `old` alone has, without weights of `variant`, which the new ones replace."""
    for path in old.iterdir():
        found = _variant_of(path.name)
        is_replaced = found == variant or (new.name in SHARED_PARTS and found != NO_WEIGHTS)
        if (new / path.name).exists() or is_replaced:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.copytree(path, new / path.name, symlinks=True, copy_function=_link)
        else:
            _link(path, new / path.name)


def _warn_of_other_variants(folder: Path, new: Path, variant: str | None) -> None:
    """Warns where weights of another variant get another calibration than they had, as they stay and it is shared."""
    parts = [part for part in new.iterdir() if part.is_dir() and (folder / part.name).is_dir()]
    others = {
        _variant_of(path.name)
        for part in parts
        if part.name not in SHARED_PARTS
        for path in (folder / part.name).iterdir()
        if _variant_of(path.name) not in (variant, NO_WEIGHTS)
    }
    changed = [
        part.name
        for part in parts
        if part.name in SHARED_PARTS
        and any(
            not any(filecmp.cmp(path, one, shallow=False) for one in part.glob("*.safetensors"))
            for path in (folder / part.name).glob("*.safetensors")
        )
    ]
    if others and changed:
        names = " and ".join(sorted("no variant" if one is None else f"variant {one!r}" for one in others))
        warnings.warn(
            f"{folder} holds weights of {names} as well. All variants share `{'`, `'.join(sorted(changed))}`: what was "
            f"saved there is replaced, for them too. If they are to keep theirs, save each variant in its own folder.",
            stacklevel=5,
        )


def _variant_of(name: str) -> str | None:
    """The variant of a file of weights, None for those without one; `NO_WEIGHTS` of another file."""
    # NAME.safetensors, NAME.fp16.safetensors, NAME.safetensors.index.fp16.json, and shards, of which diffusers has
    # written NAME-00001-of-00002.fp16.safetensors and NAME.fp16-00001-of-00002.safetensors
    shard = r"(?:-\d+-of-\d+)?"
    match = re.fullmatch(rf"[^.]+(?:\.([\w-]+?){shard})?\.safetensors(?:\.index(?:\.([\w-]+))?\.json)?", name)
    return NO_WEIGHTS if match is None else match[1] or match[2]


def _link(source: str | os.PathLike, destination: str | os.PathLike) -> None:
    try:
        os.link(source, destination, follow_symlinks=False)
    except (OSError, NotImplementedError):  # not every file system has links
        shutil.copy2(source, destination, follow_symlinks=False)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Waits until no other process is at work in `folder`."""
    try:
        import fcntl
    except ImportError:  # Windows, where a folder that is in use cannot be renamed anyway
        yield
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        yield
        return
    try:
        with contextlib.suppress(OSError):  # not every file system has locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
