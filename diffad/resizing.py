"""Bilinear resizing with antialiasing in float32, without torch: Pillow's, which torch's follows to 1e-6."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

PIXELS_AT_ONCE = 4_000_000  # of a region, in float32


class Resizing(NamedTuple):
    """How images and maps are resized: as torch does it, or the same to 1e-6 without it.

    image: (decoded PIL image, (R, R), value range or None) -> (R, R, 3) float32 in about [0, 1].
    map: ((h, w) float32, (H, W)) -> (H, W).
    region: (h, w) bool, which pixels of an image count; None for all.
    cell: height and width in pixels of an image that a pixel of its map has, where maps are blended of tiles: such a
        map ends with the last cell, and the image perhaps within it. None where maps end as images do.
    """

    image: Callable[[Any, tuple[int, int], float | None], np.ndarray]
    map: Callable[[np.ndarray, tuple[int, int]], np.ndarray]
    region: np.ndarray | None = None
    cell: tuple[int, int] | None = None


def map_reach(size: Sequence[int], image_size: Sequence[int], cell: Sequence[int] | None) -> tuple[int, int]:
    """The size to which a map is resized so that its upper left part, of `size`, is the image's; as of `Resizing`."""
    if cell is None:
        return size[0], size[1]
    height, width = (
        round(length * -(-whole // one) * one / whole)
        for length, whole, one in zip(size, image_size, cell, strict=True)
    )
    return height, width


def fit_map(values: np.ndarray, size: tuple[int, int], image_size: Sequence[int], resizing: Resizing) -> np.ndarray:
    """An image's map (h, w) at a size of the image's, (*size) float32, 0 where nothing counts."""
    resized = resizing.map(values, map_reach(size, image_size, resizing.cell))[: size[0], : size[1]]
    return resized if resizing.region is None else np.where(region_at(resizing.region, size), resized, np.float32(0.0))


def region_at(region: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """`inside_region` of one region (h, w), (*size) bool: a pixel counts where at least half of it does."""
    rows = pool_weights(region.shape[0], size[0])
    wide = region.astype(np.float32) @ pool_weights(region.shape[1], size[1]).T  # (h, W)
    inside, step = np.empty(size, bool), max(1, PIXELS_AT_ONCE // size[1])
    starts = range(0, size[0], step)
    largest = 0.0
    for start in starts:
        largest = max(largest, float((rows[start : start + step] @ wide).max()))
        if largest >= 0.5:
            break
    for start in starts:
        inside[start : start + step] = rows[start : start + step] @ wide >= min(largest, 0.5) - 1e-6
    return inside


def resize_array(values: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """(H, W) or (H, W, C) float32 to (*size[, C]): along the rows first, then along the columns."""
    if values.shape[:2] == tuple(size):
        return values
    if values.ndim == 3:
        return np.stack([resize_array(values[..., i], size) for i in range(values.shape[2])], axis=-1)
    picture = Image.fromarray(np.ascontiguousarray(values, dtype=np.float32))
    return np.asarray(picture.resize((size[1], size[0]), Image.Resampling.BILINEAR))


@lru_cache(maxsize=16)
def resize_weights(length: int, size: int) -> np.ndarray:
    """The matrix (size, length) float32 whose product with a column of `length` values is the column resized."""
    return resize_array(np.eye(length, dtype=np.float32), (size, length))


@lru_cache(maxsize=16)
def smoothing_weights(length: int, size: int, sigma: float) -> np.ndarray:
    """The matrix (size, length) float32 that interpolates a column of `length` values, without antialiasing, and then
    smooths it: `diffad.scoring.gaussian_smooth`, with its cut at 4 sigma and its mirrored edges, in one direction.
    """
    source = np.clip((np.arange(size) + 0.5) * length / size - 0.5, 0.0, length - 1.0)
    below = source.astype(int)
    interpolation = np.zeros((size, length))
    np.add.at(interpolation, (np.arange(size), below), 1.0 - (source - below))
    np.add.at(interpolation, (np.arange(size), np.minimum(below + 1, length - 1)), source - below)
    radius = int(4.0 * sigma + 0.5)
    if radius == 0:
        return interpolation.astype(np.float32)
    offsets = np.arange(-radius, radius + 1)
    kernel = np.exp(-0.5 * (offsets / sigma) ** 2)
    places = (np.arange(size)[:, None] + offsets) % (2 * size)
    smoothing = np.zeros((size, size))
    rows = np.broadcast_to(np.arange(size)[:, None], places.shape)
    np.add.at(smoothing, (rows, np.minimum(places, 2 * size - 1 - places)), kernel / kernel.sum())
    return (smoothing @ interpolation).astype(np.float32)


def pool_weights(length: int, size: int) -> np.ndarray:
    """The same of adaptive average pooling, whose windows may overlap: torch's `adaptive_avg_pool1d`."""
    weights = np.zeros((size, length), dtype=np.float32)
    for i in range(size):
        start, end = i * length // size, -(-(i + 1) * length // size)
        weights[i, start:end] = 1.0 / (end - start)
    return weights
