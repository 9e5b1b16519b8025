"""Settings as Python's own numbers and lists, which a configuration file can hold."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any


def plain_value(value: Any) -> Any:
    """A setting with numbers and arrays of NumPy or torch, and others such as fractions, as Python's own.

    Example:
        >>> import numpy as np
        >>> plain_value({"kl": np.float32(0.5), "sides": (np.int64(2), 3)})
        {'kl': 0.5, 'sides': (2, 3)}
    """
    if hasattr(value, "tolist"):  # of an array, a tensor, or a scalar of theirs
        return value.tolist()
    if isinstance(value, Real) and not isinstance(value, (bool, int, float)):
        return int(value) if isinstance(value, Integral) else float(value)
    if isinstance(value, Mapping):
        return {name: plain_value(one) for name, one in value.items()}
    if type(value) in (list, tuple):
        return type(value)(plain_value(one) for one in value)
    return value
