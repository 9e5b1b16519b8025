"""Images of more than 8 bits: which range their values are in. A file of 16 bits does not say what its camera had."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from PIL import Image

from diffad.warn_once import warn_once

BAND_PIXELS = 2**22  # of larger images so many are looked at at once
OVERSHOOT = 1.1  # up to which floats are taken to lie in [0, 1]


class UnreadableImageError(ValueError):
    """A file that is there and cannot be read as an image; the message names it and says why, `reason` only why."""

    def __init__(self, message: str, reason: str | None = None):
        super().__init__(message)
        self.reason = message if reason is None else reason


class TooManyPixelsError(UnreadableImageError):
    """A file that says of itself that it has more pixels than any is decoded with."""


def is_deep(mode: str) -> bool:
    """Whether images of a Pillow mode hold more than 8 bits: `I;16`, `I` and `F`."""
    return mode[0] in "IF"


def smallest_range(largest: float, floating: bool = False) -> float:
    """The end of the smallest range that holds a value: that of 8, 10, 12, 14, 16 or 31 bits, or 1 for floats.

    Of floats in [0, 1] some lie a little above, as resizing and sharpening make them; such are cut off at 1.
    """
    if floating and largest <= OVERSHOOT:
        return 1.0
    return next(end for end in (2.0**bits - 1.0 for bits in (8, 10, 12, 14, 16, 31)) if largest <= end)


def value_range_of(image: Any) -> float | None:
    """`smallest_range` of a PIL image, an array or a tensor with more than 8 bits; None for others.

    Raises:
        UnreadableImageError: as `check_values`.
    """
    if isinstance(image, Image.Image) and is_deep(image.mode):
        return smallest_range(check_values(image), image.mode == "F")
    if str(getattr(image, "dtype", "")) == "torch.uint16":  # by its name, as torch may not be there
        image = image.cpu().numpy()
    if isinstance(image, np.ndarray) and image.dtype.kind == "u" and image.dtype.itemsize == 2:
        return smallest_range(float(image.max(initial=0)))
    return None


def check_known_range(mode: str, value_range: float | None) -> None:
    """Raises an UnreadableImageError for a mode of more than 8 bits where no range is known, and more are to come.

    A range of its own for each image would move their scores against each other.
    """
    if value_range is None and is_deep(mode):
        raise UnreadableImageError(
            "An image of more than 8 bits does not say which of its values is white, and nor does the model. Calibrate "
            "it with images of this camera, or fit it by training/fit.py with --value_range, 4095 for 12 bits."
        )


def warn_of_found_range(value_range: float) -> None:
    """Says, once, which range was taken for images of more than 8 bits."""
    warn_once(
        f"Images of more than 8 bits are taken to lie in [0, {value_range:g}], the smallest range that holds them all: "
        "this model says nothing of it. Give it a `value_range`, such as 4095 for a camera of 12 bits."
    )


def check_values(image: Image.Image) -> float:
    """The largest value of an image of mode `I;16`, `I` or `F`; 255 for others.

    Raises:
        UnreadableImageError: values are negative, not finite or, in mode `F`, above 65535.
    """
    if not is_deep(image.mode):
        return 255.0
    if 0 in image.size:
        return 0.0
    # NumPy takes a copy of what Pillow holds, and Pillow makes two for it: so in bands of rows
    rows = max(1, BAND_PIXELS // image.width)
    bands = (image.crop((0, top, image.width, min(top + rows, image.height))) for top in range(0, image.height, rows))
    ends = np.array([(values.min(), values.max()) for values in map(np.asarray, bands)], np.float64)  # (bands, 2)
    smallest, largest = float(ends[:, 0].min()), float(ends[:, 1].max())
    end = 65535.0 if image.mode == "F" else 2.0**31 - 1.0
    if not (smallest >= 0 and largest <= end):  # so that NaN, too, is refused
        raise UnreadableImageError(
            f"an image of mode {image.mode!r} has values from {smallest} to {largest}: scale them to [0, {end:g}], or "
            "save it with 8 or 16 bits"
        )
    return largest


def scale_values(values: np.ndarray, value_range: float) -> np.ndarray:
    """Values of a range as float32 in [0, 1]; those beyond it, which no training image had, are its end."""
    largest = values.max(initial=0)
    if largest > value_range and not value_range == 1.0 < largest <= OVERSHOOT:
        warnings.warn(
            f"An image has values above {value_range:g}, the `value_range` of the model: they count as that. If the "
            "camera has changed, train a model for it.",
            stacklevel=2,
        )
    return np.minimum(values.astype(np.float32) / np.float32(value_range), np.float32(1.0))
