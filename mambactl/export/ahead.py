"""Make the next tensor while the last one is written: reading and writing take about as long."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")


def made_ahead(items: Iterator[Item]) -> Iterator[Item]:
    """The items of an iterator in their order, one made in a thread while the caller uses another.

    What the iterator raises is raised here; a caller that stops early waits for one item.
    """
    end = object()
    with ThreadPoolExecutor(1) as maker:
        coming = maker.submit(next, items, end)
        while True:
            item = coming.result()
            if item is end:
                return
            coming = maker.submit(next, items, end)
            yield item
            # not kept while the next one is waited for
            del item
