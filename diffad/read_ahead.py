"""The next of a stream, made while the last one is worked on."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import TypeVar

import torch

Item = TypeVar("Item")
END = object()
DEVICE_TYPES = ("cpu", "cuda", "mps")


def read_ahead(items: Iterator[Item]) -> Iterator[Item]:
    """The same items, each next one made in a thread of its own while the caller works: one more is in memory.

    Decoding and much of torch release the interpreter's lock. An error comes where the item would have.
    """
    # each thread has modes of its own
    grad = torch.is_grad_enabled()
    autocast = [(kind, torch.get_autocast_dtype(kind)) for kind in DEVICE_TYPES if torch.is_autocast_enabled(kind)]

    def following() -> Item | object:
        with ExitStack() as modes:
            modes.enter_context(torch.set_grad_enabled(grad))
            for kind, dtype in autocast:
                modes.enter_context(torch.autocast(kind, dtype))
            return next(items, END)

    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(following)
        while (item := coming.result()) is not END:
            coming = pool.submit(following)
            yield item  # type: ignore[misc]
