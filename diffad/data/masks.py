"""Masks of defects, of any mode, that follow their images."""

from __future__ import annotations

import numpy as np
import PIL.ExifTags
import PIL.Image
import PIL.ImageOps

from diffad.image_metadata import turn_upright
from diffad.images import image_to_rgb


def mask_to_array(mask: PIL.Image.Image) -> np.ndarray:
    """A mask of any mode as (H, W) bool: above 0 in any colour is a defect; transparency does not count."""
    mask = turn_upright(mask)
    if mask.mode == "P" or len(mask.getbands()) > 1:
        return (np.asarray(mask.convert("RGB")) > 0).any(axis=2)
    return np.asarray(mask) > 0


def resize_image_and_mask(
    image: PIL.Image.Image,
    mask: PIL.Image.Image | None,
    size: int | tuple[int, int],
    center_crop: bool = False,
) -> tuple[PIL.Image.Image, np.ndarray]:
    """Resizes an image (bilinear, antialiased) and its mask (nearest) alike.

    Args:
        image: of any mode.
        mask: of the same size; None for a good image.
        size: (height, width), or the side of a square, in pixels.
        center_crop: False stretches the image to `size`; True keeps its proportions and cuts off evenly what
            is too long.

    Returns:
        The image in RGB, and the mask as (height, width) bool, all False where there was none.

    Raises:
        ValueError: `mask` has another size than `image`, or `size` is not positive.
    """
    height, width = (size, size) if isinstance(size, int) else size
    if height < 1 or width < 1:
        raise ValueError(f"`size` must be positive, but is {size}.")
    resize = PIL.ImageOps.fit if center_crop else PIL.Image.Image.resize
    image = image_to_rgb(image)
    resized = resize(image, (width, height), PIL.Image.Resampling.BILINEAR)
    if mask is None:
        return resized, np.zeros((height, width), dtype=bool)
    defect = PIL.Image.fromarray(mask_to_array(mask).view(np.uint8))
    if defect.size != image.size:
        raise ValueError(f"`mask` is {defect.size} (width, height), but `image` is {image.size}.")
    return resized, np.asarray(resize(defect, (width, height), PIL.Image.Resampling.NEAREST)) > 0
