"""Images as users have them -> tensors as networks take them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from diffad.grey_depth import (
    BAND_PIXELS,
    UnreadableImageError,
    check_values,
    is_deep,
    scale_values,
    smallest_range,
    value_range_of,
)
from diffad.image_files import image_file_header, read_image
from diffad.image_metadata import turn_upright

ImageInput: TypeAlias = "Image.Image | np.ndarray | torch.Tensor | str | os.PathLike | Sequence[Any]"
Side: TypeAlias = int | Sequence[int]  # of a square, or height and width


def as_size(side: Side) -> tuple[int, int]:
    """Height and width in pixels: of a square where `side` is one number."""
    if isinstance(side, int):
        return side, side
    height, width = side
    return height, width


def as_side(size: Side) -> int | tuple[int, int]:
    """The inverse of `as_size`: one number for a square."""
    height, width = as_size(size)
    return height if height == width else (height, width)


def size_of_ratio(side: int, ratio: float, multiple: int = 1) -> tuple[int, int]:
    """Height and width of about as many pixels as a square of `side`, and of about a ratio, height over width.

    Each is the multiple of `multiple` that is nearest, and at least one; for a ratio of about 1 it is the square.
    """
    height, width = (max(1, round(length / multiple)) * multiple for length in (side * ratio**0.5, side / ratio**0.5))
    return (side, side) if abs(height - side) < multiple and abs(width - side) < multiple else (height, width)


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
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def find_value_range(images: Iterable[Any], skip_unreadable: bool = False) -> float | None:
    """The end of the smallest range that holds all of single images; None where none has more than 8 bits.

    Only files with more than 8 bits are decoded. Those that cannot be read raise, or are skipped.
    """
    return _find_value_range(((image, "image") for image in images), skip_unreadable)


def common_value_range(*sets: Sequence[Any]) -> float | None:
    """`find_value_range` of all images of sets; None, without reading them all, where no first one is deep."""
    if find_value_range(images[0] for images in sets if len(images)) is None:
        return None
    return find_value_range(images[i] for images in sets for i in range(len(images)))


def _find_value_range(items: Iterable[tuple[Any, str]], skip_unreadable: bool = False) -> float | None:
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


def images_to_tensors(image: ImageInput, name: str = "image", value_range: float | None = None) -> list[torch.Tensor]:
    """Canonical form of one image, a batch, or a list of them.

    Args:
        image: a PIL image; a path; an array (H, W), (H, W, C) or (N, H, W, C); a tensor (H, W), (C, H, W) or
            (N, C, H, W), with C 1 or 3; or a list of these. Integers are unsigned, floats lie in [0, 1].
        name: the argument's name, for messages.
        value_range: the largest value that images of more than 8 bits can have; None takes the smallest of 8, 10, 12,
            14 and 16 bits that holds all of `image`.

    Returns:
        A list of (3, H, W) float32 tensors in [0, 1], one an image; sizes may differ.

    Raises:
        ValueError: an empty list, an image without pixels, a wrong shape, type or range, NaN or infinity, a file
            that is no image.
        FileNotFoundError: a path at which no file stands.
    """
    items = [(read_image(one) if isinstance(one, (str, os.PathLike)) else one, of) for one, of in _flatten(image, name)]
    if value_range is None:
        value_range = _find_value_range(items)
    return [tensor for one, of in items for tensor in _to_tensors(one, of, value_range)]


def _flatten(image: ImageInput, name: str) -> list[tuple[Any, str]]:
    """The items of nested lists, each with its place for messages."""
    if not isinstance(image, (list, tuple)):
        return [(image, name)]
    if not image:
        raise ValueError(f"`{name}` is an empty list. Pass at least one image.")
    return [entry for i, item in enumerate(image) for entry in _flatten(item, f"{name}[{i}]")]


def _to_tensors(image: Any, name: str, value_range: float | None) -> list[torch.Tensor]:
    """(3, H, W) float32 tensors in [0, 1] of an image or a batch in memory."""
    if isinstance(image, Image.Image):
        image = _pil_to_array(_upright(image, name), value_range)
    if isinstance(image, np.ndarray):
        image = _array_to_tensor(image, name)  # (N, C, H, W)
    elif isinstance(image, torch.Tensor):
        if image.ndim not in (2, 3, 4):
            raise ValueError(
                f"`{name}` must have shape (H, W), (C, H, W) or (N, C, H, W), but has {tuple(image.shape)}."
            )
        image = image[(None,) * (4 - image.ndim)]  # (N, C, H, W)
    else:
        raise ValueError(
            f"`{name}` must be a PIL image, an array, a tensor, a path or a list of these, but is {type(image)}."
        )
    if image.shape[1] not in (1, 3):
        raise ValueError(
            f"`{name}` must have 1 or 3 channels, but has {image.shape[1]} (as a tensor: {tuple(image.shape)}). "
            "Tensors are channels first, arrays channels last."
        )
    if image.numel() == 0:
        raise ValueError(f"`{name}` has no pixels: its shape is {tuple(image.shape)}.")
    if image.dtype == torch.uint8:
        image = image.to(torch.float32) / 255.0
    elif image.dtype == torch.uint16:
        image = torch.from_numpy(scale_values(image.cpu().numpy(), 65535.0 if value_range is None else value_range))
    elif image.is_floating_point():
        image = image.to(torch.float32)
        lowest, highest = float(image.min()), float(image.max())  # NaN passes through min and max
        if not (np.isfinite(lowest) and np.isfinite(highest)):
            raise ValueError(f"`{name}` holds NaN or infinity. Clean it before the call.")
        if lowest < 0.0 or highest > 1.0:
            raise ValueError(
                f"`{name}` must lie in [0, 1] when it is floating point, but spans [{lowest:.4g}, {highest:.4g}]. "
                "Divide by 255 or pass uint8."
            )
    else:
        raise ValueError(f"`{name}` must be uint8, uint16 or floating point, but is {image.dtype}.")
    return list(image.expand(-1, 3, -1, -1))


def _upright(image: Image.Image, name: str) -> Image.Image:
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


def _pil_to_array(image: Image.Image, value_range: float | None) -> np.ndarray:
    """An upright image as (H, W, 3) uint8 or, where it holds more than 8 bits, (H, W) float32 in [0, 1]."""
    if not is_deep(image.mode):
        return np.asarray(image_to_rgb(image))
    largest = check_values(image)
    return scale_values(
        np.asarray(image), smallest_range(largest, image.mode == "F") if value_range is None else value_range
    )


def _array_to_tensor(array: np.ndarray, name: str) -> torch.Tensor:
    if array.ndim not in (2, 3, 4):
        raise ValueError(f"`{name}` must have shape (H, W), (H, W, C) or (N, H, W, C), but has {array.shape}.")
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim == 3:
        array = array[None]
    if array.dtype.kind not in "uf":
        raise ValueError(f"`{name}` must be an unsigned integer or floating-point array, but is {array.dtype}.")
    array = np.ascontiguousarray(array.transpose(0, 3, 1, 2))  # (N, C, H, W)
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=not array.flags.writeable))


class ImageSequence:
    """The images of a call, each decoded when its batch comes and resized at once: memory goes with the batch.

    What is in memory is checked at once, of files only the header.

    Args:
        image, value_range, name: as of `images_to_tensors`.

    Attributes:
        sizes: (height, width) of each image, upright.
        value_range: the given one or, where images have more than 8 bits, the one found.
        found_value_range: the latter alone, else None.

    Raises:
        ValueError, FileNotFoundError: as `images_to_tensors`.
    """

    def __init__(self, image: ImageInput, value_range: float | None = None, name: str = "image"):
        self._items: list[tuple[Any, str]] = []
        self.sizes: list[tuple[int, int]] = []
        deep: list[tuple[Any, str]] = []
        for one, place in _flatten(image, name):
            singles: list[Any]
            if isinstance(one, (str, os.PathLike)):
                (width, height), mode = image_file_header(one)
                singles, sizes = [one], [(height, width)]
                deep += [(one, place)] if is_deep(mode) else []
            elif isinstance(one, Image.Image):
                upright = _upright(one, place)
                singles, sizes = [upright], [(upright.height, upright.width)]
                deep += [(upright, place)] if is_deep(upright.mode) else []
            else:
                sizes = [
                    (tensor.shape[-2], tensor.shape[-1]) for tensor in _to_tensors(one, place, value_range or 2.0**31)
                ]
                singles = [one] if len(sizes) == 1 else list(one)
                deep += [(single, place) for single in singles]
            self._items += [(single, place) for single in singles]
            self.sizes += sizes
        self.found_value_range = _find_value_range(deep) if value_range is None else None
        self.value_range = self.found_value_range if value_range is None else value_range

    @classmethod
    def of_rows(cls, images: Sequence[Any], indices: Sequence[int], value_range: float | None) -> ImageSequence:
        """Single images of a sequence, such as a data set's column, each taken when its turn comes.

        Their `sizes` are not known, and no range is found: images of more than 8 bits without a `value_range` raise a
        ValueError when they come.
        """
        rows = object.__new__(cls)
        rows._items = [(partial(images.__getitem__, i), f"images[{i}]") for i in indices]
        rows.sizes, rows.value_range, rows.found_value_range = [], value_range, None
        return rows

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, batch: slice) -> ImageSequence:
        part = object.__new__(ImageSequence)
        part._items, part.sizes = self._items[batch], self.sizes[batch]
        part.value_range, part.found_value_range = self.value_range, self.found_value_range
        return part

    def resized(self, size: Sequence[int]) -> Iterable[torch.Tensor]:
        """Each image as (1, 3, *size) float32 in [0, 1], one at a time."""
        for image, name in self._decoded(reduce_large=True):
            yield resize_image(image, size, self.value_range, name)

    def whole(self) -> Iterable[Image.Image | torch.Tensor]:
        """Each image as it is, one at a time: a PIL image, upright, or a tensor (3, H, W) in [0, 1]."""
        for image, name in self._decoded(reduce_large=False):
            is_picture = isinstance(image, Image.Image)
            yield _upright(image, name) if is_picture else _to_tensors(image, name, self.value_range)[0]

    def _decoded(self, reduce_large: bool) -> Iterable[tuple[Any, str]]:
        for image, name in self._items:
            is_row = isinstance(image, partial)
            if is_row:
                image = image()
            if isinstance(image, (str, os.PathLike)):
                image = read_image(image, reduce_large=reduce_large)
            if is_row and self.value_range is None and value_range_of(image) is not None:
                raise ValueError(
                    f"`{name}` has more than 8 bits, as not all images have: give a `value_range`, such as 4095 for a "
                    "camera of 12 bits."
                )
            yield image, name


def image_to_tensor(image: Image.Image, value_range: float | None = None, name: str = "image") -> torch.Tensor:
    """One PIL image as (3, H, W) float32 in [0, 1]."""
    return _to_tensors(image, name, value_range)[0]


def resize_image(
    image: Any, size: Sequence[int], value_range: float | None = None, name: str = "image"
) -> torch.Tensor:
    """One image in memory as (1, 3, *size) float32 in about [0, 1]: the whole image is never in floating point.

    Bilinear resizing with antialiasing goes along the rows first, then along the columns, so that bands of rows give
    the same as the whole.
    """
    if not isinstance(image, Image.Image) or image.width * image.height <= BAND_PIXELS:
        return resize_images(_to_tensors(image, name, value_range)[0][None], size)
    image = turn_upright(image)
    if value_range is None:
        value_range = value_range_of(image)
    rows = max(1, BAND_PIXELS // image.width)
    bands = []
    for top in range(0, image.height, rows):
        bottom = min(top + rows, image.height)
        band = _to_tensors(image.crop((0, top, image.width, bottom)), name, value_range)[0][None]
        bands.append(resize_images(band, (bottom - top, size[1])))  # (1, 3, rows, size[1])
    return resize_images(torch.cat(bands, dim=2), size)


def resize_images(images: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Bilinear with antialiasing, (N, C, H, W) -> (N, C, *size): the one resize of training and inference."""
    if tuple(images.shape[-2:]) == tuple(size):
        return images
    return F.interpolate(images, tuple(size), mode="bilinear", antialias=True)


def images_to_pixel_values(images: Sequence[torch.Tensor] | ImageSequence, size: Sequence[int]) -> torch.Tensor:
    """(3, H_i, W_i) tensors in [0, 1] -> one batch (N, 3, *size) in [-1, 1], the networks' range."""
    if isinstance(images, ImageSequence):
        return torch.cat(list(images.resized(size))) * 2.0 - 1.0
    return torch.cat([resize_images(image[None], size) for image in images]) * 2.0 - 1.0


IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def normalize_images(images: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """(N, C, H, W) in [-1, 1], normalised by colours' means and deviations, each (C,), of images in [0, 1]."""
    shift, scale = (images.new_tensor(values).view(1, -1, 1, 1) for values in (mean, std))
    return (images / 2.0 + 0.5 - shift) / scale


def denormalize_images(pixel_values: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """The inverse of `normalize_images`, not clamped."""
    shift, scale = (pixel_values.new_tensor(values).view(1, -1, 1, 1) for values in (mean, std))
    return (pixel_values * scale + shift) * 2.0 - 1.0
