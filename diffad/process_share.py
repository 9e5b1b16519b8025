"""Which images a process of several looks at, and what all of them must agree on; processes are accelerate's."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from accelerate import Accelerator

Result = TypeVar("Result")
GO_ON = "What is done is kept: start the same command again, with any number of processes."
LONGEST_WAIT = timedelta(days=7)  # of a process that has done its share for one that has not


def process_share(count: int, accelerator: Accelerator | None) -> range:
    """This process's share of `count` images, by their places; all of them where there is one process alone."""
    if accelerator is None:
        return range(count)
    return range(accelerator.process_index, count, accelerator.num_processes)


def launched_processes() -> Accelerator | None:
    """What `accelerate launch` has started this process as one of; None where it runs alone.

    Asked to end, as where another process of the run has died, it says so and what to do.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return None
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    signal.signal(signal.SIGTERM, _stop)
    return Accelerator(mixed_precision="no", kwargs_handlers=[InitProcessGroupKwargs(timeout=LONGEST_WAIT)])


def on_main(accelerator: Accelerator | None, work: Callable[[], Result]) -> Result:
    """What `work`, done by the main process alone, gives; every process gets it.

    Raises:
        SystemExit: in the other processes, where the main one has raised an error, which says what is wrong.
    """
    if accelerator is None:
        return work()
    from accelerate.utils import broadcast_object_list

    found: list[Any] = [None, False]
    error: BaseException | None = None
    if accelerator.is_main_process:
        try:
            found = [work(), True]
        except Exception as raised:
            error = raised
    with _all_alive():
        broadcast_object_list(found)
    if error is not None:
        raise error
    if not found[1]:
        raise SystemExit(1)
    return found[0]


def of_all_processes(accelerator: Accelerator | None, value: Result) -> list[Result]:
    """Every process's value, once all have come here."""
    if accelerator is None:
        return [value]
    from accelerate.utils import gather_object

    with _all_alive():
        return gather_object([value])


@contextmanager
def _all_alive() -> Iterator[None]:
    """Raises a RuntimeError that says what to do where another process has died."""
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(f"Another process of this run has ended before its share was done. {GO_ON}") from error


def _stop(number: int, frame: Any) -> None:
    raise SystemExit(f"Stopped: another process of this run has ended, or all were asked to. {GO_ON}")
