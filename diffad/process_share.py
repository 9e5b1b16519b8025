"""Which images a process of several looks at."""

from __future__ import annotations

from accelerate import Accelerator


def process_share(count: int, accelerator: Accelerator | None) -> range:
    """This process's share of `count` images, by their places; all of them where there is one process alone."""
    if accelerator is None:
        return range(count)
    return range(accelerator.process_index, count, accelerator.num_processes)
