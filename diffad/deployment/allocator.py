"""How much memory the C library keeps for a process of many threads."""

from __future__ import annotations

import ctypes
import sys

M_ARENA_MAX = -8  # of glibc's malloc.h
ARENAS = 2


def limit_arenas() -> None:
    """Has glibc's allocator keep two arenas, as `MALLOC_ARENA_MAX=2` would; elsewhere nothing happens.

    By default it keeps up to eight a core, and each grows to what the largest requests of its threads took: a service
    would grow by hundreds of MB (docs/deployment.md).
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(M_ARENA_MAX, ARENAS)
