"""Batches made ahead in a thread, so that stacking rows never keeps a GPU waiting."""

import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mambactl.data.pack import Batch

DEPTH = 2
# how often the thread looks whether anybody still wants its batches
POLL_SECONDS = 0.1


@contextmanager
def ahead(source: Iterator[Batch], pin: bool) -> Iterator[Iterator[Batch]]:
    """Yield the batches of `source` in order, the next `DEPTH` of them ready.

    With `pin` they lie in page-locked memory, from which a copy to the GPU does not wait. What
    `source` raises is raised where the batch is asked for.
    """
    ready: queue.Queue[Batch | BaseException] = queue.Queue(DEPTH)
    unwanted = threading.Event()

    def offer(item: Batch | BaseException) -> None:
        while not unwanted.is_set():
            try:
                return ready.put(item, timeout=POLL_SECONDS)
            except queue.Full:
                continue

    def work() -> None:
        try:
            for batch in source:
                offer(_pinned(batch) if pin else batch)
                if unwanted.is_set():
                    return
        except BaseException as error:
            offer(error)

    thread = threading.Thread(target=work, name="batches", daemon=True)
    thread.start()
    try:
        yield _taken(ready)
    finally:
        unwanted.set()
        thread.join()


def _taken(ready: "queue.Queue[Any]") -> Iterator[Batch]:
    while True:
        item = ready.get()
        if isinstance(item, BaseException):
            raise item
        yield item


def _pinned(batch: Batch) -> Batch:
    return Batch(*(None if tensor is None else tensor.pin_memory() for tensor in batch))
