"""Ctrl-C and SIGTERM, put off until a training step is complete, so that a run goes on later as if undisturbed."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def catch_stop_signals() -> Iterator[list[int]]:
    """Within, SIGINT (Ctrl-C) and SIGTERM only put their number into the list.

    A second Ctrl-C interrupts at once. Afterwards the signals are handled as before, and one that came too late for
    anybody to look at it is sent again. Python handles signals in the main thread: in another, nothing is caught. A
    signal that is ignored (as under `nohup`) stays so.
    """
    received: list[int] = []
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    if threading.current_thread() is not threading.main_thread():
        before = {}
    caught = {number: handler for number, handler in before.items() if handler not in (signal.SIG_IGN, None)}

    def remember(number: int, frame: object) -> None:
        received.append(number)
        if signal.SIGINT in caught:
            signal.signal(signal.SIGINT, caught[signal.SIGINT])

    for number in caught:
        signal.signal(number, remember)
    try:
        yield received
    finally:
        for number, handler in caught.items():
            signal.signal(number, handler)
    if received:
        signal.raise_signal(received[-1])


def received_anywhere(received: list[int], accelerator: Accelerator) -> int:
    """The number of a signal that some process has received, or 0; the same on every process, which all must ask."""
    number = max(received, default=0)
    if accelerator.num_processes == 1:
        return number
    return int(accelerator.gather(torch.tensor([number], device=accelerator.device)).max())


def ignore_stop_signals(worker: int) -> None:
    """For a data loader's workers, which receive what their process's group does: it is the process that stops."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
