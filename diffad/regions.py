"""Defects as a list: the connected regions of an anomaly mask, with what the map shows in each.

And the smallest region that counts: how high a map is where a region of some area stands together.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

EIGHT_NEIGHBOURS = np.ones((3, 3), dtype=bool)  # corners count, as in PRO


class Region(NamedTuple):
    """One connected region of an image's anomaly mask.

    box: (x, y, width, height) in pixels of the map; x and y are of the region's left and upper pixels, from 0.
    area: in pixels of the map.
    peak: the map's highest value in the region.
    mean: the map's mean over the region.
    """

    box: tuple[int, int, int, int]
    area: int
    peak: float
    mean: float


def can_list_regions() -> bool:
    """Whether SciPy is there, without which an exported model runs, too, and lists no regions."""
    try:
        import scipy.ndimage  # noqa: F401
    except ImportError:
        return False
    return True


def find_regions(anomaly_map: np.ndarray, mask: np.ndarray) -> list[Region]:
    """The 8-connected regions of a mask, the one with the highest peak first.

    ```python
    find_regions(out.anomaly_map[0], out.anomaly_mask[0])[0].box  # (x, y, width, height)
    ```

    Args:
        anomaly_map: (H, W) float.
        mask: (H, W) bool.
    """
    return [region for region, _ in outlined_regions(anomaly_map, mask)]


def outlined_regions(anomaly_map: np.ndarray, mask: np.ndarray) -> list[tuple[Region, np.ndarray]]:
    """`find_regions`, each with the part of the mask in its box that is its own, (height, width) bool."""
    return sorted(_regions(anomaly_map, mask), key=lambda one: one[0].peak, reverse=True)


def _regions(anomaly_map: np.ndarray, mask: np.ndarray) -> Iterator[tuple[Region, np.ndarray]]:
    from scipy import ndimage

    for around in ndimage.find_objects(mask.astype(np.uint8)):  # one box, of all that is set, or none
        labels, _ = ndimage.label(mask[around], structure=EIGHT_NEIGHBOURS)
        for number, (rows, columns) in enumerate(ndimage.find_objects(labels), start=1):
            inside = labels[rows, columns] == number
            top, left = around[0].start + rows.start, around[1].start + columns.start
            height, width = inside.shape
            values = anomaly_map[top : top + height, left : left + width][inside]
            mean = float(values.mean(dtype=np.float64))
            yield Region((left, top, width, height), len(values), float(values.max()), mean), inside


def run_lengths(inside: np.ndarray, left: int, top: int, height: int, width: int) -> list[int]:
    """COCO's uncompressed run-length encoding of a region: pixels off, on, off, ..., down one column after another.

    It is what `pycocotools.mask.frPyObjects` takes as `{"counts": ..., "size": [height, width]}`.

    Args:
        inside: (h, w) bool, the region in its box, with at least one pixel.
        left, top: where the box begins in the image.
        height, width: of the image, in pixels.
    """
    columns, rows = np.nonzero(inside.T)
    places = (left + columns.astype(np.int64)) * height + top + rows  # ascending
    breaks = np.flatnonzero(np.diff(places) > 1)
    starts, ends = places[np.r_[0, breaks + 1]], places[np.r_[breaks, -1]] + 1
    edges = np.stack([starts, ends], axis=1).ravel()
    counts = np.diff(edges, prepend=0, append=height * width).tolist()
    return counts if counts[-1] else counts[:-1]  # no run of length 0 behind a region that ends in the last corner


def num_smallest(share: float, size: tuple[int, int]) -> int:
    """The fewest pixels of a region that counts, of a map (H, W), where it takes a share of the image's area."""
    return max(1, math.ceil(share * math.prod(size) - 1e-9))


def without_small_regions(mask: np.ndarray, share: float) -> np.ndarray:
    """A mask (H, W) bool less its regions below a share of its area, in [0, 1)."""
    num_pixels = num_smallest(share, mask.shape)
    if num_pixels == 1:
        return mask
    from scipy import ndimage

    kept = np.zeros_like(mask)
    for around in ndimage.find_objects(mask.astype(np.uint8)):
        labels, _ = ndimage.label(mask[around], structure=EIGHT_NEIGHBOURS)
        areas = np.bincount(labels.ravel())
        areas[0] = 0  # the ground
        kept[around] = (areas >= num_pixels)[labels]
    return kept


def level_of_area(anomaly_map: np.ndarray, num_pixels: int) -> float:
    """The highest level at which a map has an 8-connected region of at least `num_pixels`.

    It is the maximum of the map's grey-scale area opening (Vincent, "Grayscale area openings and closings, their
    efficient implementation and applications", 1993). Regions only grow as the level falls, so bisection finds it.

    Args:
        anomaly_map: (H, W) float, finite.
        num_pixels: from 1, which gives the map's maximum, to H * W, which gives its minimum.
    """
    from scipy import ndimage

    side = math.ceil(math.sqrt(num_pixels))
    low = float(anomaly_map.min())
    if side <= min(anomaly_map.shape):  # a square of these pixels is such a region: the level cannot be below it
        low = float(ndimage.minimum_filter(anomaly_map, side, mode="constant", cval=-math.inf).max())
    around = ndimage.find_objects((anomaly_map >= low).astype(np.uint8))[0]
    cut = anomaly_map[around]
    # no region has more pixels than there are
    levels = np.unique(cut[cut >= low])
    levels = levels[levels <= np.partition(cut.ravel(), -num_pixels)[-num_pixels]]
    first, last = 0, len(levels) - 1
    while first < last:
        middle = (first + last + 1) // 2
        labels, _ = ndimage.label(cut >= levels[middle], structure=EIGHT_NEIGHBOURS)
        if np.bincount(labels.ravel())[1:].max() >= num_pixels:
            first = middle
        else:
            last = middle - 1
    return float(levels[first])
