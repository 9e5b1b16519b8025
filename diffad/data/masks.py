"""Reads masks of defects, of any mode, and resizes them with their images."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import PIL.Image
from scipy import ndimage

from diffad.images import image_to_rgb
from diffad.reading.grey_depth import UnreadableImageError
from diffad.reading.image_files import read_image
from diffad.reading.image_metadata import turn_upright
from diffad.reading.inputs import images_below

LARGEST_COUNT = 16  # of kinds of defect that are told apart by other values
LARGEST_AVERAGED = 16  # pixels in a block, whose averages are told from labels
LARGEST_LABEL = 63  # masks that number the kinds of defect, as VisA's, count from 1


def mask_to_array(mask: PIL.Image.Image) -> np.ndarray:
    """A mask of any mode as (H, W) bool: which pixels are of a defect.

    This is the one place that decides so, by the values, of colours the highest of the three:

    - Two values, or numbers of kinds or of single defects (all values whole and at most 63, or at most 16 values that
      are far apart, an eighth of the largest below the first and a sixteenth between any two, or any number that fill
      areas: half of the pixels between 0 and the largest have equal neighbours): what is above 0 is a defect. Of more
      than 16 values those near 0 and the largest tell nothing, as JPEG makes such; somewhere they must jump; more than
      a quarter of them must fill areas, and an eighth of the pixels is enough.
    - Others have soft edges, as JPEG and resizing make them: from half of the largest value on it is a defect, so that
      the mask does not grow. So have few values far apart that are even fractions of the largest, as averages of blocks
      are, where most pixels between 0 and the largest lie beside a larger value.

    Where some pixels are transparent, they are ground. Of the others the values count, and all of them are a defect if
    none is above 0: it was drawn in black.
    """
    values = _mask_values(mask)
    levels = _levels(values)
    return values >= levels[-1] / 2 if _has_soft_edges(values, levels) else values > 0


def unite_masks(folder: str | Path) -> PIL.Image.Image:
    """The masks in a folder as one, 0 and 255: some data sets have a file for each defect of an image.

    Raises:
        UnreadableImageError: one cannot be read, or has another size than the first.
        FileNotFoundError: there is none.
    """
    united: np.ndarray | None = None
    for path in images_below(os.fspath(folder)):
        mask = mask_to_array(read_image(path))
        if united is not None and mask.shape != united.shape:
            reason = f"{path.name} has another size than the masks before it"
            raise UnreadableImageError(f"`mask`: {folder} cannot be read ({reason}).", reason)
        united = mask if united is None else united | mask
    if united is None:
        raise FileNotFoundError(f"There is no mask in {os.fspath(folder)}.")
    return PIL.Image.fromarray(united.view(np.uint8) * 255)


def has_soft_edges(mask: PIL.Image.Image) -> bool:
    """Whether `mask_to_array` takes half of a mask's largest value for its threshold."""
    values = _mask_values(mask)
    return _has_soft_edges(values, _levels(values))


def _mask_values(mask: PIL.Image.Image) -> np.ndarray:
    """(H, W), 0 where a mask is transparent."""
    mask = turn_upright(mask)
    alpha = None
    if mask.has_transparency_data:
        mask = mask.convert("RGBA")
        alpha = np.asarray(mask)[..., 3]
        alpha = alpha >= max(1, alpha.max(initial=0) / 2)  # of the ink, which may be transparent itself
    if mask.mode == "P" or len(mask.getbands()) > 1:
        values = np.asarray(mask.convert("RGB")).max(axis=2)
    else:
        values = np.asarray(mask)
    if alpha is None or alpha.all() or not alpha.any():  # then alpha tells nothing
        return values
    return np.where(alpha, values, 0) if values[alpha].any() else alpha


def _levels(values: np.ndarray) -> np.ndarray:
    """The distinct values, in order; always one."""
    if values.dtype == np.uint8:  # much faster than sorting
        return np.flatnonzero(np.bincount(values.ravel(), minlength=1)) if values.size else np.zeros(1)
    return np.unique(values) if values.size else np.zeros(1)


def _has_soft_edges(values: np.ndarray, levels: np.ndarray) -> bool:
    largest = float(levels[-1])
    if len(levels) <= 2 or (largest <= LARGEST_LABEL and (levels % 1 == 0).all()):
        return False
    between = (values > 0) & (values < largest)
    lowest, highest = _of_neighbours(values, np.minimum), _of_neighbours(values, np.maximum)
    least_flat = 1 / 2
    if len(levels) > LARGEST_COUNT:
        if (highest - values).max() < largest / 16:  # a slope so long that it looks flat
            return True
        between = (values > largest / 16) & (values < largest - largest / 16)
        flat_levels = np.unique(values[between & (lowest == highest)])
        if 4 * len(flat_levels) <= len(np.unique(values[between])):  # of labels most fill areas, of JPEG's noise none
            return True
        least_flat = 1 / 8  # many defects are small ones, of few pixels without another value around them
    else:
        steps, first = np.diff(levels.astype(np.float64)), float(levels[levels > 0][0])
        if first >= largest / 8 and steps.min() >= largest / 16:  # edges would hold all that lies between, too
            return _are_averages(levels) and 2 * int((between & (highest > values)).sum()) > int(between.sum())
    return int((between & (lowest == highest)).sum()) < least_flat * int(between.sum())


def _are_averages(levels: np.ndarray) -> bool:
    """Whether all values are even fractions of the largest, but for rounding: those of blocks of two values are."""
    if len(levels) < 5:  # labels may be even fractions, too: 0, 127 and 255
        return False
    fractions = levels.astype(np.float64) / float(levels[-1])
    parts = np.arange(2, LARGEST_AVERAGED + 1)[:, None]
    return bool((np.abs(fractions - np.round(fractions * parts) / parts).max(axis=1) <= 1 / 255).any())


def _of_neighbours(values: np.ndarray, choose: np.ufunc) -> np.ndarray:
    """The smallest or largest value of each pixel and the eight around it; much faster than SciPy's filters."""
    padded = np.pad(values, 1, mode="edge")
    rows = choose(choose(padded[:-2], padded[1:-1]), padded[2:])
    return choose(choose(rows[:, :-2], rows[:, 1:-1]), rows[:, 2:])


def defects_at(mask: PIL.Image.Image, size: tuple[int, int], inside: np.ndarray | None = None) -> tuple[int, int, int]:
    """What becomes of a mask's defects where it is resized to (height, width), by the nearest pixel.

    A thin one may lose all of its pixels, or some, and fall into pieces, each of which counts as a defect in PRO.

    Args:
        mask: of any mode, as of `mask_to_array`.
        size: (height, width).
        inside: which pixels of the mask count, of its own size, bool; None for all.

    Returns:
        How many defects it has (8-connected, as in MVTec's evaluation), how many have no pixel at that size, and how
        many fall into pieces there.
    """
    corners, defective = np.ones((3, 3)), mask_to_array(mask)
    numbers, count = ndimage.label(defective if inside is None else defective & inside, structure=corners)
    resized = PIL.Image.fromarray(numbers.astype(np.int32)).resize(size[::-1], PIL.Image.Resampling.NEAREST)
    left = np.asarray(resized)
    boxes = ndimage.find_objects(left, max_label=count)  # of each defect; None where it has no pixel
    pieces = [ndimage.label(left[box] == i + 1, structure=corners)[1] for i, box in enumerate(boxes) if box is not None]
    return count, count - len(pieces), sum(number > 1 for number in pieces)


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
