"""How many cores a process may use, and torch's threads on them."""

from __future__ import annotations

import os
from pathlib import Path

CPU_MAX = Path("/sys/fs/cgroup/cpu.max")  # of a container: microseconds of a period of so many, or "max"


def available_cores(cpu_max: Path = CPU_MAX) -> int:
    """Cores that this process may use: of the machine, of its affinity, of its container's share."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = cpu_max.read_text().split()
        return max(1, min(cores, round(int(quota) / int(period))))
    except (OSError, ValueError):  # no container, or one without a bound
        return cores


def limit_threads() -> None:
    """Gives torch no more threads than `available_cores`, unless `OMP_NUM_THREADS` says how many.

    By itself torch takes the machine's: in a container that may use a few of many cores, these threads wait for turns.
    """
    import torch

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(torch.get_num_threads(), available_cores()))
