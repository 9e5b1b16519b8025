"""Sides of images, in pixels: of squares and of others, without torch."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import TypeAlias

Side: TypeAlias = int | Sequence[int]  # of a square, or height and width


def as_size(side: Side) -> tuple[int, int]:
    """Height and width in pixels: of a square where `side` is one number."""
    if isinstance(side, (int, Integral)):  # NumPy's, too
        return int(side), int(side)
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
