"""Kill one process of a run while it trains, and time until all of them have ended."""

import os
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path

from watch import tree_of

POLL = 0.02


class LostProcess:
    """Kills process `rank` of a run with SIGKILL once `metrics` has some lines.

    Call it beside the run (`watch.run`). `found` has then the line after which it killed, and the
    seconds until every process of the run had ended.
    """

    def __init__(self, metrics: Path, rank: int, after: int = 2):
        self.metrics, self.rank, self.after = metrics, rank, after
        self.found: dict[str, float] = {}

    def __call__(self, pid: int, done: threading.Event) -> None:
        """Wait for the lines, kill, and wait for the end."""
        while (lines := self._lines()) < self.after:
            if done.wait(POLL):
                return
        every = tree_of(pid)
        for each in filter(self._is_rank, every):
            os.kill(each, signal.SIGKILL)
            killed = time.monotonic()
            while any(map(_runs, every)) and not done.wait(POLL):
                pass
            # the last one is the launcher, whose end is what `done` says
            self.found = {"rank": self.rank, "line": lines, "seconds": time.monotonic() - killed}

    def _lines(self) -> int:
        try:
            return self.metrics.read_bytes().count(b"\n")
        except OSError:
            return 0

    def _is_rank(self, pid: int) -> bool:
        """True for the process itself: what it started has its environment, and another parent."""
        return _rank(pid) == self.rank and _rank(_parent(pid)) != self.rank


def _rank(pid: int) -> int | None:
    with suppress(OSError):
        for entry in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
            name, _, value = entry.partition(b"=")
            if name == b"RANK" and value.isdigit():
                return int(value)
    return None


def _parent(pid: int) -> int:
    with suppress(OSError):
        # the name in brackets may hold anything
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return 0


def _runs(pid: int) -> bool:
    """True unless a process has ended, or only waits for its parent to hear of it."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False
