"""A text being written: the scheduler's thread adds tokens, whoever replies takes them."""

import asyncio
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from mambactl.decode.open_batch import Likely, RowRequest
from mambactl.serving.refusals import Refused


@dataclass(frozen=True)
class Arrived:
    """Tokens that came together; the last of a text come with the reason of its end."""

    tokens: list[int]
    likely: list[Likely] | None = None
    finish: str | None = None
    failure: Refused | None = None


class WrittenText:
    """One text; `add` may be called in another thread than the rest.

    What arrives is noted without waking anybody who does not wait: texts of many rows are handed
    on some tokens at a time then, which is what a busy server has time for.
    """

    def __init__(self, request: RowRequest):
        self.request = request
        self._arrived: deque[Arrived] = deque()
        self._changed = asyncio.Event()
        self.awaited = False

    def add(self, arrived: Arrived) -> None:
        """Note what arrived."""
        self._arrived.append(arrived)

    async def take(self) -> Iterable[Arrived]:
        """Wait for tokens; all that have arrived."""
        self.awaited = True
        while not self._arrived:
            self._changed.clear()
            if not self._arrived:
                await self._changed.wait()
        self.awaited = False
        return [self._arrived.popleft() for _ in range(len(self._arrived))]

    def wake(self) -> None:
        """Wake the waiting reply because something arrived; call it in the event loop's thread."""
        self._changed.set()


@dataclass
class Job:
    """A prompt and the texts behind it; `began` is a reading of the monotonic clock."""

    prompt: list[int]
    texts: list[WrittenText]
    began: float
    cancelled: bool = False
    # its beginning that other prompts have as well was kept, or cannot be
    branched: bool = False
    counted: bool = False
