"""Requests that come one by one, run through the networks together."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any


class BusyError(RuntimeError):
    """More images wait than may."""


class Batcher:
    """A thread that takes what has come while the batch before was run: nothing waits for others to come.

    Args:
        run: from a list of items to one result for each. Where it raises, each item is run once more by itself, so that
            an error is that of the item which causes it.
        batch_size: the most items in one run.
        max_waiting: the most items that wait or are run.
        report: called with each batch's size.
    """

    def __init__(
        self,
        run: Callable[[list[Any]], list[Any]],
        batch_size: int,
        max_waiting: int,
        report: Callable[[int], None] = lambda size: None,
    ):
        self.run, self.batch_size, self.max_waiting, self.report = run, batch_size, max_waiting, report
        self.waiting: queue.SimpleQueue[tuple[Any, Future] | None] = queue.SimpleQueue()
        self.count, self.lock = 0, threading.Lock()
        self.thread = threading.Thread(target=self._loop, name="batches", daemon=True)
        self.thread.start()

    def submit(self, items: Sequence[Any]) -> list[Future]:
        """The items' results, when they are there; of all of them or of none.

        Raises:
            BusyError: with them, more than `max_waiting` items would wait.
        """
        with self.lock:
            if self.count + len(items) > self.max_waiting:
                raise BusyError(f"{self.count} images wait already, and no more than {self.max_waiting} may.")
            self.count += len(items)
        futures: list[Future] = [Future() for _ in items]
        for pair in zip(items, futures, strict=True):
            self.waiting.put(pair)
        return futures

    def close(self) -> None:
        """Ends the thread once what waits is done."""
        self.waiting.put(None)
        self.thread.join()

    def _loop(self) -> None:
        is_open = True
        while is_open:
            batch = [self.waiting.get()]
            while len(batch) < self.batch_size and not self.waiting.empty():
                batch.append(self.waiting.get())
            is_open = None not in batch
            self._run([one for one in batch if one is not None])

    def _run(self, batch: list[tuple[Any, Future]]) -> None:
        # what nobody waits for any more is left out, and from here on cannot be cancelled
        wanted = [one for one in batch if one[1].set_running_or_notify_cancel()]
        if wanted:
            self._answer(wanted)
        with self.lock:
            self.count -= len(batch)
        if wanted:
            self.report(len(wanted))

    def _answer(self, batch: list[tuple[Any, Future]]) -> None:
        try:
            answers = list(zip(batch, self.run([item for item, _ in batch]), strict=True))
        except BaseException as error:
            if len(batch) == 1:
                batch[0][1].set_exception(error)
            else:  # each by itself: one item's error is not the others'
                for one in batch:
                    self._answer([one])
            return
        for (_, future), result in answers:
            future.set_result(result)
