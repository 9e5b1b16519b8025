"""Names that look the same: Unicode writes ä as one letter (NFC), or as two, which archives from macOS hold (NFD)."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterable
from pathlib import Path


def composed(name: str) -> str:
    """In the form of fewer letters."""
    return unicodedata.normalize("NFC", name)


def same_name(name: str, names: Iterable[str]) -> str | None:
    """The one of `names` that is `name` or else looks like it; None where there is none."""
    names = list(names)
    return name if name in names else next((one for one in names if composed(one) == composed(name)), None)


def file_below(folder: str | os.PathLike, name: str) -> Path:
    """A file's path; that of the name's other form where only a file of that is there."""
    path = Path(folder, name)
    if name.isascii() or os.path.isfile(path):
        return path
    others = (Path(folder, unicodedata.normalize(form, name)) for form in ("NFC", "NFD"))
    return next((other for other in others if os.path.isfile(other)), path)
