"""Reads masks of defects, of any mode, and resizes them with their images."""

from __future__ import annotations

import numpy as np
import PIL.Image

from diffad.images import image_to_rgb, turn_upright


def mask_to_array(mask: PIL.Image.Image) -> np.ndarray:
    """A mask of any mode as (H, W) bool: above 0 in any colour is a defect; transparency does not count."""
    mask = turn_upright(mask)
    if mask.mode == "P" or len(mask.getbands()) > 1:
        return np.greater(np.asarray(mask.convert("RGB")), 0).any(axis=2)
    return np.greater(np.asarray(mask), 0)


def resize_image_and_mask(
    image: PIL.Image.Image,
    mask: PIL.Image.Image | None,
    size: int | tuple[int, int],
) -> tuple[PIL.Image.Image, np.ndarray]:
    """Stretches an image (bilinear, antialiased) and its mask (nearest) to a size.

    Args:
        image: of any mode.
        mask: of the same size; None for a good image.
        size: (height, width), or the side of a square, in pixels.

    Returns:
        The image in RGB, and the mask as (height, width) bool, all False where there was none.

    Raises:
        ValueError: `mask` has another size than `image`, or `size` is not positive.
    """
    height, width = (size, size) if isinstance(size, int) else size
    if height < 1 or width < 1:
        raise ValueError(f"`size` must be positive, but is {size}.")
    image = image_to_rgb(image)
    resized = image.resize((width, height), PIL.Image.Resampling.BILINEAR)
    if mask is None:
        return resized, np.zeros((height, width), dtype=bool)
    defect = PIL.Image.fromarray(mask_to_array(mask).view(np.uint8))
    if defect.size != image.size:
        raise ValueError(f"`mask` is {defect.size} (width, height), but `image` is {image.size}.")
    return resized, np.asarray(defect.resize((width, height), PIL.Image.Resampling.NEAREST)) > 0
