"""Bilinear resizing with antialiasing in float32, without torch: Pillow's, which torch's follows to 1e-6."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from PIL import Image


class Resizing(NamedTuple):
    """How images and maps are resized: as torch does it, or the same to 1e-6 without it.

    image: (decoded PIL image, (R, R), value range or None) -> (R, R, 3) float32 in about [0, 1].
    map: ((h, w) float32, (H, W)) -> (H, W).
    """

    image: Callable[[Any, tuple[int, int], float | None], np.ndarray]
    map: Callable[[np.ndarray, tuple[int, int]], np.ndarray]


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
