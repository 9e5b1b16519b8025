"""Images as users have them -> tensors as networks take them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

ImageInput: TypeAlias = "Image.Image | np.ndarray | torch.Tensor | str | os.PathLike | Sequence[Any]"
_INTEGER_RANGE = {torch.uint8: 255.0, torch.uint16: 65535.0}


def read_image(path: str | os.PathLike) -> Image.Image:
    """Opens and fully decodes an image file.

    Raises:
        FileNotFoundError: no file stands at `path`.
        ValueError: the file is empty, truncated or no image; the message names it.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"`image`: no file at {path}.")
    if path.stat().st_size == 0:
        raise ValueError(f"`image`: {path} is empty (0 bytes). Replace or remove the file.")
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"`image`: {path} cannot be read as an image ({error}). Replace or remove it.") from error


def image_to_rgb(image: Image.Image) -> Image.Image:
    """Any PIL image as 8-bit RGB, turned upright by its EXIF orientation.

    Deeper images are scaled by the range of their type, never clipped. 16 bit: divided by 257. Mode `I`, in
    which PIL holds 16-bit values too: the same or, if a value is larger, by the range of 32 bit signed. Mode
    `F`: the range is [0, 1] or, if a value is larger, [0, 255], or [0, 65535]. Transparent pixels are laid
    over white.

    Raises:
        ValueError: mode `I` or `F` with values that are negative, not finite or beyond these ranges.
    """
    image = turn_upright(image)
    if image.mode[0] in "IF":
        values = np.asarray(image)  # (H, W)
        scaled = np.multiply(values, 255.0 / _largest_value(values, image), dtype=np.float32)
        return Image.fromarray(np.rint(scaled).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _largest_value(values: np.ndarray, image: Image.Image) -> float:
    """The upper end of the range that an image of mode `I;16`, `I` or `F` is in."""
    if image.mode.startswith("I;16"):
        return 65535.0
    ends = (1.0, 255.0, 65535.0) if image.mode == "F" else (65535.0, 2.0**31 - 1.0)
    smallest, largest = values.min(), values.max()
    if not (smallest >= 0 and largest <= ends[-1]):  # so that NaN, too, is refused
        raise ValueError(
            f"{getattr(image, 'filename', '') or 'The image'} of mode {image.mode!r} has values from "
            f"{smallest} to {largest}: scale them to [0, {ends[-1]:g}], or save it with 8 or 16 bits."
        )
    return next(end for end in ends if largest <= end)


def turn_upright(image: Image.Image) -> Image.Image:
    """Applies an image's EXIF orientation; an upright one is returned as it is."""
    if image.getexif().get(ExifTags.Base.Orientation, 1) == 1:
        return image  # exif_transpose would copy it
    return ImageOps.exif_transpose(image)


def images_to_tensors(image: ImageInput, name: str = "image") -> list[torch.Tensor]:
    """Canonical form of one image, a batch, or a list of them.

    Args:
        image: a PIL image; a path; an array (H, W), (H, W, C) or (N, H, W, C); a tensor (H, W), (C, H, W) or
            (N, C, H, W), with C 1 or 3; or a list of these. Integers are unsigned and span their type's range,
            floats lie in [0, 1].
        name: the argument's name, for messages.

    Returns:
        A list of (3, H, W) float32 tensors in [0, 1], one an image; sizes may differ.

    Raises:
        ValueError: an empty list, an image without pixels, a wrong shape, type or range, NaN or infinity, a file
            that is no image.
        FileNotFoundError: a path at which no file stands.
    """
    if isinstance(image, (list, tuple)):
        if not image:
            raise ValueError(f"`{name}` is an empty list. Pass at least one image.")
        return [tensor for i, item in enumerate(image) for tensor in images_to_tensors(item, f"{name}[{i}]")]
    if isinstance(image, (str, os.PathLike)):
        image = read_image(image)
    if isinstance(image, Image.Image):
        if 0 in image.size:
            raise ValueError(f"`{name}` has no pixels: its size is {image.size}.")
        try:
            image = np.asarray(image_to_rgb(image))
        except (OSError, ValueError) as error:  # a lazily opened file may turn out cut off only here
            raise ValueError(f"`{name}` cannot be read as an image: {error}") from error
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
    if image.dtype in _INTEGER_RANGE:
        image = image.to(torch.float32) / _INTEGER_RANGE[image.dtype]
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


def resize_images(images: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Bilinear with antialiasing, (N, C, H, W) -> (N, C, *size): the one resize of training and inference."""
    if tuple(images.shape[-2:]) == tuple(size):
        return images
    return F.interpolate(images, tuple(size), mode="bilinear", antialias=True)


def images_to_pixel_values(images: Sequence[torch.Tensor], size: Sequence[int]) -> torch.Tensor:
    """(3, H_i, W_i) tensors in [0, 1] -> one batch (N, 3, *size) in [-1, 1], the networks' range."""
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
