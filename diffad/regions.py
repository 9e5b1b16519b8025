"""Defects as a list: the connected regions of an anomaly mask, with what the map shows in each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from scipy import ndimage

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
