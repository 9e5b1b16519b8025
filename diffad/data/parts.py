"""Which images show the same part, where one is photographed several times."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np


def check_part_pattern(part_pattern: str, name: str = "`part_pattern`") -> None:
    """Says early what is wrong with a pattern; `name` is how its user spells the argument.

    Raises:
        ValueError: it is no regular expression, or matches the empty text.
    """
    try:
        empty = re.compile(part_pattern).match("") is not None
    except re.error as error:
        raise ValueError(f"{name} is no regular expression: {error}.") from None
    if empty:
        raise ValueError(f"{name} must not match the empty text: it would find the same part in every path.")


def part_index(paths: Sequence[str], part_pattern: str | None, name: str = "`part_pattern`") -> np.ndarray:
    """(N,) integers from 0: images with the same one show the same part; without a pattern, each shows its own.

    Args:
        paths: of the images.
        part_pattern: a regular expression that finds the part in a path, folders included, at its first match: the
            groups in parentheses, or else all of it.
        name: how its user spells the argument, for errors.

    Raises:
        ValueError: it finds nothing in one of the paths, or there is no path.
    """
    if part_pattern is None:
        return np.arange(len(paths))
    names = []
    for path in paths:
        if not path:
            raise ValueError(f"{name} looks into paths, but this data set has none for its images. Leave it out.")
        match = re.search(part_pattern, path)
        if match is None:
            raise ValueError(
                f"{name} {part_pattern!r} finds no part in the path {path!r} of an image. Give a regular expression "
                "that finds one in every path, or leave it out."
            )
        names.append("/".join(match.groups(default="")) if any(match.groups()) else match.group())
    return np.unique(names, return_inverse=True)[1]


def halve_parts(part: np.ndarray) -> np.ndarray:
    """(N,) bool: the images of one half of the parts. Each part in turn goes to the side with fewer images.

    Args:
        part: (N,) what `part_index` gives. Where each image shows its own part, every other image is True.
    """
    num_images = np.bincount(part)  # of each part
    is_second = np.zeros(len(num_images), dtype=bool)
    of_sides = [0, 0]
    for one, count in enumerate(num_images):
        is_second[one] = of_sides[1] < of_sides[0]
        of_sides[int(is_second[one])] += count
    return is_second[part]
