"""SIGINT and SIGTERM as a request that the loop answers between steps."""

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Self

from mambactl import console
from mambactl.ranks import processes

Handler = signal.Handlers | int | Callable[[int, FrameType | None], object]


class StopRequest:
    """While active, the first signal only sets `signum`; a second one acts at once.

    So does the first where nothing is `unsaved`: a step may compile for minutes before its end.
    Several processes always wait, since all must take the same last step.

    After saving, `deliver` gives the signal to whoever handled it before. Outside the main thread
    signals are left alone.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self.unsaved = False
        self._previous: dict[int, Handler | None] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                self._previous[signum] = signal.signal(signum, self._ask)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._restore()

    def deliver(self) -> None:
        """Raise the signal that arrived, now with its former handler."""
        self._restore()
        if self.signum is not None:
            signal.raise_signal(self.signum)

    def _ask(self, signum: int, frame: FrameType | None) -> None:
        self.signum = signum
        self._restore()
        if not self.unsaved and processes() == 1:
            signal.raise_signal(signum)
            return
        console.log("stopping after this step; a second signal stops at once", level=0)

    def _restore(self) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler if handler is not None else signal.SIG_DFL)
        self._previous = {}
