"""Make the next tensor while the last one is written: reading and writing take about as long."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")


def made_ahead(items: Iterator[Item]) -> Iterator[Item]:
    """The items of an iterator in their order, one made in a thread while the caller uses another.

    What the iterator raises is raised here; a caller that stops early waits for one item.
    """
    with ThreadPoolExecutor(1) as maker:
        coming = maker.submit(_next, items)
        while True:
            found = coming.result()
            if not found:
                return
            coming = maker.submit(_next, items)
            yield found.pop()


def _next(items: Iterator[Item]) -> list[Item]:
    """The next item in a list, empty at the end: popping it drops the last reference here."""
    return list(islice(items, 1))
