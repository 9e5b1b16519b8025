"""What every process of a machine needs of a data set, computed once a machine and kept on disk."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset, concatenate_datasets
from datasets.fingerprint import get_temporary_cache_files_directory


def shared_map(dataset: Dataset, function: Callable[..., Any], **options: Any) -> Dataset:
    """`dataset.map(function, **options)`, of which each process of a machine computes a share, and all read the whole.

    All processes must call this. The rows are those of `dataset`, in its order, in memory-mapped files. Shares are of
    one size, so a process waits for the others no longer than these take longer for theirs.

    Raises:
        ValueError: there are fewer rows than processes.
    """
    state = PartialState()
    if len(dataset) < state.num_processes:
        raise ValueError(f"{len(dataset)} training images are too few for {state.num_processes} processes.")
    machine = processes_of_this_machine()
    share = dataset.shard(len(machine), machine.index(state.process_index), contiguous=True).map(
        function,
        # a data set in memory would keep this one there too; one on disk has a place for it, and finds it again
        cache_file_name=None if dataset.cache_files else temporary_table(),
        **options,
    )
    if state.num_processes == 1:
        return share
    (file,) = share.cache_files
    files = gather_object([file["filename"]])  # of all processes, in their order
    return concatenate_datasets([Dataset.from_file(files[process]) for process in machine])


def processes_of_this_machine() -> range:
    """Indices, among all processes, of those that run on this machine and see the same files.

    Where the launcher does not say how many these are, as torch's does, this process alone.
    """
    state = PartialState()
    count = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if state.num_processes > 1 else 1
    first = state.process_index - (state.local_process_index if count > 1 else 0)
    return range(first, first + count)


def temporary_table() -> str:
    """Path for a table of a `datasets.Dataset`, removed when the process ends."""
    return str(Path(get_temporary_cache_files_directory(), f"{uuid.uuid4().hex}.arrow"))
