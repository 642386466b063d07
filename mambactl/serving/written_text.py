"""A text being written: the scheduler's thread adds tokens, whoever replies takes them."""

import asyncio
from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

from mambactl.decode.open_batch import Likely, RowRequest
from mambactl.serving.refusals import Refused


class Arrived(NamedTuple):
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
        self._waiting = self._ended = False

    @property
    def awaited(self) -> bool:
        """True if the reply is to hear of what arrived at once."""
        return self._waiting or self._ended

    def add(self, arrived: Arrived) -> None:
        """Note what arrived."""
        self._arrived.append(arrived)
        self._ended |= arrived.finish is not None or arrived.failure is not None

    async def take(self, pause: float = 0.0) -> Arrived:
        """Wait for tokens; all that have arrived, together.

        Before, `pause` seconds pass in which more arrive, or less where the text ends.
        """
        if pause and not self._ended:
            await self._pause(pause)
        self._waiting = True
        while not self._arrived:
            self._changed.clear()
            if not self._arrived:
                await self._changed.wait()
        self._waiting = False
        return _joined([self._arrived.popleft() for _ in range(len(self._arrived))])

    async def _pause(self, seconds: float) -> None:
        self._changed.clear()
        timer = asyncio.get_running_loop().call_later(seconds, self._changed.set)
        # it may have ended just before the event was cleared
        if not self._ended:
            await self._changed.wait()
        timer.cancel()

    def wake(self) -> None:
        """Wake the waiting reply because something arrived; call it in the event loop's thread."""
        self._changed.set()


def _joined(parts: list[Arrived]) -> Arrived:
    """Join what arrived part by part: all tokens, and the finish or failure of the last part."""
    last = parts[-1]
    if len(parts) == 1:
        return last
    tokens = [token for part in parts for token in part.tokens]
    likely: list[Likely] | None = None
    if parts[0].likely is not None:
        likely = [each for part in parts for each in part.likely or ()]
    return Arrived(tokens, likely, last.finish, last.failure)


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
