"""A warning that is told once a process."""

from __future__ import annotations

import functools
import logging


@functools.cache
def warn_once(message: str) -> None:
    """Logs a warning, the first time that this message comes."""
    logging.getLogger("diffad").warning(message)
