"""Images of a data set's rows, read as every other image file is."""

from __future__ import annotations

import os
from typing import Any

import datasets
import fsspec
from PIL import Image

from diffad.data.masks import unite_masks
from diffad.reading.image_files import read_image


class ImageFile(datasets.Image):
    """`datasets.Image`, whose rows are decoded by `read_image`: upright, and whatever stands in their metadata."""

    def decode_example(self, value: Any, token_per_repo_id: dict[str, Any] | None = None) -> Image.Image:
        """A PIL image of `{"bytes", "path"}`, as `read_stored`.

        Raises:
            FileNotFoundError: no file stands at the path.
            UnreadableImageError: it is no image.
        """
        if not self.decode or not isinstance(value, dict):
            return super().decode_example(value, token_per_repo_id)
        return read_stored(value)


def read_stored(stored: dict[str, Any], name: str | None = None) -> Image.Image:
    """The image of an undecoded row, or the union of the masks where the path is a folder of them.

    Args:
        stored: `{"bytes", "path"}`.
        name: for errors, where there is no path.

    Raises:
        FileNotFoundError, UnreadableImageError: as `read_image`.
    """
    path, content = stored["path"] or name, stored_content(stored)
    if content is None and path is not None and os.path.isdir(path):
        return unite_masks(path)
    return read_image(path, content)


def stored_content(stored: dict[str, Any]) -> bytes | None:
    """The bytes of an undecoded image that is no file here; None for a file."""
    path = stored["path"]
    if stored["bytes"] is None and path is not None and "://" in os.fspath(path):
        with fsspec.open(path, "rb") as file:
            return file.read()
    return stored["bytes"]
