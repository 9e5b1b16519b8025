"""Images as users have them -> arrays, without torch."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image

from diffad.reading.grey_depth import (
    BAND_PIXELS,
    UnreadableImageError,
    check_values,
    is_deep,
    scale_values,
    smallest_range,
    value_range_of,
)
from diffad.reading.image_files import image_file_header, read_image
from diffad.reading.image_metadata import turn_upright
from diffad.resizing import Resizing, resize_array

BEYOND = 1e-3  # by which resizing leaves [0, 1]
CACHED_PIXELS = 2**18  # in floating point, 3 MB of colours


def image_to_rgb(image: Image.Image, value_range: float | None = None) -> Image.Image:
    """Any PIL image as 8-bit RGB for the screen, turned upright by its EXIF or XMP orientation.

    Deeper images, of modes `I;16`, `I` and `F`, are scaled by `value_range` or, without one, by the smallest range
    that holds the image (see `smallest_range`). Transparent pixels are laid over white.

    Raises:
        UnreadableImageError: mode `I` or `F` with values that are negative, not finite or beyond every range.
    """
    image = turn_upright(image)
    if is_deep(image.mode):
        value_range = smallest_range(check_values(image), image.mode == "F") if value_range is None else value_range
        scaled = scale_values(np.asarray(image), value_range)
        return Image.fromarray(np.rint(scaled * 255.0).astype(np.uint8)).convert("RGB")
    if image.mode == "La":  # which Pillow converts to nothing else
        image = image.convert("LA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def find_value_range(images: Iterable[Any], skip_unreadable: bool = False) -> float | None:
    """The end of the smallest range that holds all of single images; None where none has more than 8 bits.

    Only files with more than 8 bits are decoded. Those that cannot be read raise, or are skipped.
    """
    return smallest_common_range(((image, "image") for image in images), skip_unreadable)


def common_value_range(*sets: Sequence[Any]) -> float | None:
    """`find_value_range` of all images of sets; None, without reading them all, where no first one is deep."""
    if find_value_range(images[0] for images in sets if len(images)) is None:
        return None
    return find_value_range(images[i] for images in sets for i in range(len(images)))


def smallest_common_range(items: Iterable[tuple[Any, str]], skip_unreadable: bool = False) -> float | None:
    found: float | None = None
    for image, name in items:
        try:
            if isinstance(image, (str, os.PathLike)):
                image = read_image(image) if is_deep(image_file_header(image)[1]) else None
        except (UnreadableImageError, FileNotFoundError):
            if skip_unreadable:
                continue
            raise
        try:
            one = value_range_of(image)
        except UnreadableImageError as error:
            raise UnreadableImageError(f"`{name}` cannot be read as an image: {error}") from error
        if one is not None:
            found = one if found is None else max(found, one)
    return found


def flatten(image: Any, name: str) -> list[tuple[Any, str]]:
    """The items of nested lists, each with its place for messages."""
    if not isinstance(image, (list, tuple)):
        return [(image, name)]
    if not image:
        raise ValueError(f"`{name}` is an empty list. Pass at least one image.")
    return [entry for i, item in enumerate(image) for entry in flatten(item, f"{name}[{i}]")]


def to_arrays(image: Any, name: str, value_range: float | None) -> np.ndarray:
    """An image or a batch in memory, a PIL image or an array (H, W), (H, W, C) or (N, H, W, C).

    Returns:
        (N, H, W, C) float32 in [0, 1], C 1 or 3.

    Raises:
        ValueError: as of `diffad.images.images_to_tensors`.
    """
    if isinstance(image, Image.Image):
        image = pil_to_array(upright_image(image, name), value_range)
    if not isinstance(image, np.ndarray):
        raise ValueError(
            f"`{name}` must be a PIL image, an array, a tensor, a path or a list of these, but is {type(image)}."
        )
    if image.ndim not in (2, 3, 4):
        raise ValueError(f"`{name}` must have shape (H, W), (H, W, C) or (N, H, W, C), but has {image.shape}.")
    if image.ndim == 2:
        image = image[..., None]
    if image.ndim == 3:
        image = image[None]
    if image.dtype.kind not in "uf":
        raise ValueError(f"`{name}` must be an unsigned integer or floating-point array, but is {image.dtype}.")
    count, height, width, channels = image.shape
    if channels not in (1, 3):
        raise ValueError(
            f"`{name}` must have 1 or 3 channels, but has {channels} (as a tensor: "
            f"{(count, channels, height, width)}). Tensors are channels first, arrays channels last."
        )
    if image.size == 0:
        raise ValueError(f"`{name}` has no pixels: its shape is {image.shape}.")
    if image.dtype.kind == "f":
        image = within_range(image.astype(np.float32, copy=not image.flags.writeable), name)
    elif image.dtype.itemsize == 1:
        image = image.astype(np.float32) / np.float32(255.0)
    elif image.dtype.itemsize == 2:
        image = scale_values(image, 65535.0 if value_range is None else value_range)
    else:
        raise ValueError(f"`{name}` must be uint8, uint16 or floating point, but is {image.dtype}.")
    return image


def within_range(pixels: np.ndarray, name: str) -> np.ndarray:
    """Floating-point pixels in [0, 1], where resizing may have left it by a little.

    Raises:
        ValueError: they are beyond it, or not finite.
    """
    lowest, highest = float(pixels.min()), float(pixels.max())  # NaN passes through min and max
    if not (np.isfinite(lowest) and np.isfinite(highest)):
        raise ValueError(f"`{name}` holds NaN or infinity. Clean it before the call.")
    if lowest < -BEYOND or highest > 1.0 + BEYOND:
        raise ValueError(
            f"`{name}` must lie in [0, 1] when it is floating point, but spans [{lowest:.4g}, {highest:.4g}]. "
            "Divide by 255 or pass uint8."
        )
    return np.clip(pixels, 0.0, 1.0) if lowest < 0.0 or highest > 1.0 else pixels


def upright_image(image: Image.Image, name: str) -> Image.Image:
    """A PIL image, decoded and upright.

    Raises:
        ValueError, UnreadableImageError: it has no pixels, or turns out broken only now that it is decoded.
    """
    if 0 in image.size:
        raise ValueError(f"`{name}` has no pixels: its size is {image.size}.")
    try:
        upright = turn_upright(image)
        check_values(upright)
    except MemoryError:
        raise
    except Exception as error:
        raise UnreadableImageError(f"`{name}` cannot be read as an image: {error}") from error
    return upright


def pil_to_array(image: Image.Image, value_range: float | None) -> np.ndarray:
    """An upright image as (H, W, 3) uint8 or, where it holds more than 8 bits, (H, W) float32 in [0, 1]."""
    if not is_deep(image.mode):
        return np.asarray(image_to_rgb(image))
    largest = check_values(image)
    return scale_values(
        np.asarray(image), smallest_range(largest, image.mode == "F") if value_range is None else value_range
    )


def image_size(image: Any, name: str) -> tuple[int, int]:
    """Height and width of a path, a PIL image or an array, upright; of a file mostly without decoding it."""
    if isinstance(image, (str, os.PathLike)):
        return image_file_header(image)[0][::-1]
    if isinstance(image, Image.Image):
        return upright_image(image, name).size[::-1]
    return to_arrays(image, name, 2.0**31).shape[1:3]


def is_large(image: Any) -> bool:
    """Whether an image is to be in floating point by `row_bands` alone, and never as a whole."""
    return isinstance(image, Image.Image) and image.width * image.height > BAND_PIXELS


def row_bands(image: Image.Image, value_range: float | None, name: str) -> Iterator[np.ndarray]:
    """A large image from its top to its bottom, (rows, W, C) float32 in [0, 1], each of few enough for the cache."""
    image = turn_upright(image)
    if value_range is None:
        value_range = value_range_of(image)
    rows = max(1, CACHED_PIXELS // image.width)
    for top in range(0, image.height, rows):
        bottom = min(top + rows, image.height)
        yield to_arrays(image.crop((0, top, image.width, bottom)), name, value_range)[0]


def resized_array(image: Any, size: Sequence[int], value_range: float | None = None, name: str = "image") -> np.ndarray:
    """One PIL image or array as (*size, 3) float32 in about [0, 1]: the same as `diffad.images.resize_image`, to 1e-6.

    A large image is never in floating point as a whole, see there.
    """
    if not is_large(image):
        resized = resize_array(to_arrays(image, name, value_range)[0], size)
        return np.broadcast_to(resized, (*size, 3))
    bands = [resize_array(band, (len(band), size[1])) for band in row_bands(image, value_range, name)]
    return np.broadcast_to(resize_array(np.concatenate(bands), size), (*size, 3))


WITHOUT_TORCH = Resizing(resized_array, resize_array)
