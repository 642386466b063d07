"""Text that is learned several times: writing it takes longer than a step of a small draft."""

from collections import deque
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from itertools import count

from mambactl.data.pack import Batch
from mambactl.train.ledger import Written
from mambactl.train.loop import Feed


class RepeatedText:
    """Feed that asks another one for text at every `uses`-th step and repeats earlier text between.

    A step of the text written last is followed by one each of the texts before it, so that all are
    learned `uses` times, further apart than one step (those at the start and the end differ). Only
    for text that does not depend on what is trained: a run that resumes has it written again.
    """

    def __init__(self, feed: Feed, uses: int, grad_accum: int):
        """Repeat the text of optimiser steps of `grad_accum` batches each."""
        self.feed, self.uses, self.grad_accum = feed, uses, grad_accum
        self._counts: deque[Written] = deque()

    @contextmanager
    def open(self, done: int) -> Iterator[Iterator[Batch]]:
        """Batches from number `done` on; see `Feed`."""
        step = done // self.grad_accum
        first = max(step // self.uses - self.uses + 1, 0)
        with self.feed.open(first * self.grad_accum) as source:
            yield self._batches(source, first, step)

    def take_counts(self) -> Written:
        """Return the counts of the oldest step that is not logged yet, zeros without new text."""
        return self._counts.popleft()

    def _batches(
        self, source: Iterator[Batch], first: int, step: int
    ) -> Generator[Batch, None, None]:
        held: dict[int, list[Batch]] = {}
        for number in count(step):
            newest, back = divmod(number, self.uses)
            written = Written()
            for text in range(max(held, default=first - 1) + 1, newest + 1):
                held[text] = [next(source) for _ in range(self.grad_accum)]
                counts = self.feed.take_counts()
                # what a resumed run writes again was counted before
                written = counts if back == 0 and text == newest else written
                held.pop(text - self.uses, None)
            self._counts.append(written)
            # the first steps have fewer texts behind them
            yield from held[newest - back % (newest + 1)]
