"""Heartbeat of the log: long work is named again while nothing else is printed."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from mambactl import console

# seconds of silence after which a line follows, and seconds between two looks at the clock
SILENCE, LOOK = 8.0, 0.5
_beating = threading.Lock()


@contextmanager
def heartbeat(what: str) -> Iterator[None]:
    """Say every `SILENCE` seconds, where nothing else is said, that `what` goes on.

    The innermost `console.doing` inside the block takes the place of `what`. Blocks may lie in each
    other: the outermost one speaks.
    """
    with console.doing(what):
        if not _beating.acquire(blocking=False):
            yield
            return
        ended = threading.Event()
        thread = threading.Thread(target=_beat, args=(ended,), name="heartbeat", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            _beating.release()


def _beat(ended: threading.Event) -> None:
    begun = time.monotonic()
    known, since = "", begun
    while not ended.wait(LOOK):
        # numbers of a task change while it stays the same
        work = console.activity()
        if work.partition(":")[0] != known:
            known, since = work.partition(":")[0], time.monotonic()
        now = time.monotonic()
        # silence before the block is not its own
        if min(console.silent_since(), now - begun) >= SILENCE:
            # it may have begun just now, behind another that was as silent
            spent = f" ({now - since:.0f} s)" if now - since >= 2 * LOOK else ""
            console.log(f"still at work: {work}{spent}")
