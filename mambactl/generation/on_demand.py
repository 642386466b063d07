"""Work that reports to a listener, as a generator that its caller drives."""

import threading
from collections.abc import Callable, Generator
from queue import SimpleQueue
from typing import TypeVar

Item = TypeVar("Item")


class _Done:
    """The end of the work, with what it raised."""

    def __init__(self, error: BaseException | None):
        self.error = error


def on_demand(work: Callable[[Callable[[Item], bool]], object]) -> Generator[Item, None, None]:
    """Yield what `work` hands to its listener; between two items it stands still.

    The listener returns True once the generator is closed, and `work` should then come to an end,
    for which closing waits. `work` runs in a thread of its own, never at the same time as the
    caller: a program that ends with an item unread leaves no thread at work.
    """
    items: SimpleQueue[Item | _Done] = SimpleQueue()
    wanted = threading.Semaphore(0)
    closed = threading.Event()

    def listen(item: Item) -> bool:
        items.put(item)
        wanted.acquire()
        return closed.is_set()

    def run() -> None:
        error = None
        try:
            work(listen)
        except BaseException as found:
            error = found
        items.put(_Done(error))

    thread = threading.Thread(target=run, name="on_demand", daemon=True)
    thread.start()
    try:
        while not isinstance(item := items.get(), _Done):
            yield item
            wanted.release()
        if item.error is not None:
            raise item.error
    finally:
        closed.set()
        wanted.release()
        thread.join()
