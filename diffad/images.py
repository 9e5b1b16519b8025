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

from diffad.exporting import is_exporting
from diffad.image_sizes import Side, as_side, as_size, size_of_ratio
from diffad.reading.grey_depth import is_deep, value_range_of
from diffad.reading.image_arrays import (
    common_value_range,
    find_value_range,
    flatten,
    image_to_rgb,
    is_large,
    row_bands,
    smallest_common_range,
    to_arrays,
    upright_image,
)
from diffad.reading.image_files import image_file_header, read_image
from diffad.resizing import Resizing, resize_weights

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "ImageInput",
    "ImageSequence",
    "Side",
    "as_side",
    "as_size",
    "common_value_range",
    "denormalize_images",
    "find_value_range",
    "image_to_rgb",
    "images_to_pixel_values",
    "images_to_tensors",
    "normalize_images",
    "resample",
    "resize_image",
    "resize_images",
    "size_of_ratio",
]

ImageInput: TypeAlias = "Image.Image | np.ndarray | torch.Tensor | str | os.PathLike | Sequence[Any]"


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
    items = [(read_image(one) if isinstance(one, (str, os.PathLike)) else one, of) for one, of in flatten(image, name)]
    if value_range is None:
        value_range = smallest_common_range(items)
    return [tensor for one, of in items for tensor in _to_tensors(one, of, value_range)]


def _to_tensors(image: Any, name: str, value_range: float | None) -> list[torch.Tensor]:
    """(3, H, W) float32 tensors in [0, 1] of an image or a batch in memory."""
    if isinstance(image, torch.Tensor):
        if image.ndim not in (2, 3, 4):
            raise ValueError(
                f"`{name}` must have shape (H, W), (C, H, W) or (N, C, H, W), but has {tuple(image.shape)}."
            )
        image = image[(None,) * (4 - image.ndim)].movedim(1, -1)  # (N, H, W, C)
        image = (image.float() if image.is_floating_point() else image).detach().cpu().numpy()
    return list(_from_arrays(to_arrays(image, name, value_range)))


def _from_arrays(images: np.ndarray) -> torch.Tensor:
    """(N, H, W, C), C 1 or 3, as (N, 3, H, W)."""
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))).expand(-1, 3, -1, -1)


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
        for one, place in flatten(image, name):
            singles: list[Any]
            if isinstance(one, (str, os.PathLike)):
                (width, height), mode = image_file_header(one)
                singles, sizes = [one], [(height, width)]
                deep += [(one, place)] if is_deep(mode) else []
            elif isinstance(one, Image.Image):
                upright = upright_image(one, place)
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
        self.found_value_range = smallest_common_range(deep) if value_range is None else None
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
            yield upright_image(image, name) if is_picture else _to_tensors(image, name, self.value_range)[0]

    def _decoded(self, reduce_large: bool) -> Iterable[tuple[Any, str]]:
        for image, name in self._items:
            is_row = isinstance(image, partial)
            if is_row:
                image = image()
                is_list = isinstance(image, (list, tuple)) and bool(image)
                holds_images = is_list and (hasattr(image[0], "shape") or isinstance(image[0], (str, Image.Image)))
                if holds_images or (getattr(image, "ndim", 0) == 4 and len(image) != 1):
                    raise ValueError(f"`{name}` is a batch: make a list of single images of all batches.")
            if isinstance(image, (str, os.PathLike)):
                image = read_image(image, reduce_large=reduce_large)
            if is_row and self.value_range is None and value_range_of(image) is not None:
                raise ValueError(
                    f"`{name}` has more than 8 bits, as not all images have: give a `value_range`, such as 4095 for a "
                    "camera of 12 bits."
                )
            yield image, name


def image_to_tensor(image: Image.Image, value_range: float | None = None) -> torch.Tensor:
    """One PIL image as (3, H, W) float32 in [0, 1]."""
    return _to_tensors(image, "image", value_range)[0]


def resize_image(
    image: Any, size: Sequence[int], value_range: float | None = None, name: str = "image"
) -> torch.Tensor:
    """One image in memory as (1, 3, *size) float32 in about [0, 1]: the whole image is never in floating point.

    Bilinear resizing with antialiasing goes along the rows first, then along the columns, so that bands of rows give
    the same as the whole.
    """
    if not is_large(image):
        return resize_images(_to_tensors(image, name, value_range)[0][None], size)
    bands = [
        resize_images(_from_arrays(band[None]), (len(band), size[1]))  # (1, 3, rows, size[1])
        for band in row_bands(image, value_range, name)
    ]
    return resize_images(torch.cat(bands, dim=2), size)


def resize_images(images: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Bilinear with antialiasing, (N, C, H, W) -> (N, C, *size): the one resize of training and inference."""
    if tuple(images.shape[-2:]) == tuple(size):
        return images
    if is_exporting():  # not every runtime knows antialiasing, and OpenVINO passes over it silently
        height, width = images.shape[-2:]
        return resample(images, resize_weights(height, size[0]), resize_weights(width, size[1]))
    return F.interpolate(images, tuple(size), mode="bilinear", antialias=True)


def network_input(image: Image.Image, size: Sequence[int], value_range: float | None) -> np.ndarray:
    """`resize_image` as (*size, 3)."""
    return resize_image(image, size, value_range)[0].movedim(0, -1).numpy()


def resize_map(values: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """`resize_images` of one array, (h, w) float32 -> size."""
    return resize_images(torch.from_numpy(values)[None, None], size)[0, 0].numpy()


WITH_TORCH = Resizing(network_input, resize_map)


def resample(images: torch.Tensor, rows: np.ndarray, columns: np.ndarray) -> torch.Tensor:
    """(N, C, H, W) to (N, C, h, w) by two products, with weights (h, H) and (w, W)."""
    return torch.from_numpy(rows).to(images) @ (images @ torch.from_numpy(columns).to(images).mT)


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
