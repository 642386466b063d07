"""A record of the package's files of which a function runs."""

import inspect
import os
import sys
import threading
from pathlib import Path
from types import CodeType, FrameType, TracebackType

# code objects that are part of the code around them: Python 3.12 has none for most of them
INLINE = {"<listcomp>", "<setcomp>", "<dictcomp>", "<genexpr>"}


class Recorder:
    """Notes files below `package`, relative to its parent, from `with` until its end.

    A file is noted when a function, method or lambda that is written in it starts or, being a
    generator, goes on; in whatever thread, but on Python 3.11 only in this one and in threads that
    start later. Neither the code of a module nor the body of a class is a function, but a function
    that an import calls is one. `step` gets what runs while `in_step` is true, `whole` everything.
    """

    def __init__(self, package: Path, monitoring: bool = hasattr(sys, "monitoring")):
        self.parent, self.prefix = package.parent, f"{package}{os.sep}"
        self.monitoring = monitoring
        self.in_step = False
        self.whole: set[str] = set()
        self.step: set[str] = set()

    def __enter__(self) -> "Recorder":
        if self.monitoring:
            tool, events = sys.monitoring, sys.monitoring.events
            tool.use_tool_id(tool.PROFILER_ID, "footprint")
            for event in (events.PY_START, events.PY_RESUME):
                tool.register_callback(tool.PROFILER_ID, event, self._started)
            tool.set_events(tool.PROFILER_ID, events.PY_START | events.PY_RESUME)
        else:
            self.before = sys.gettrace()
            threading.settrace(self._called)
            sys.settrace(self._called)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.monitoring:
            sys.monitoring.set_events(sys.monitoring.PROFILER_ID, 0)
            sys.monitoring.free_tool_id(sys.monitoring.PROFILER_ID)
        else:
            sys.settrace(self.before)
            threading.settrace(None)

    def files(self, found: set[str]) -> list[str]:
        """`whole` or `step`, sorted."""
        return sorted(Path(name).relative_to(self.parent).as_posix() for name in found)

    def _note(self, code: CodeType) -> bool:
        """True if this code counts."""
        function = code.co_flags & inspect.CO_OPTIMIZED and code.co_name not in INLINE
        if not function or not code.co_filename.startswith(self.prefix):
            return False
        self.whole.add(code.co_filename)
        if self.in_step:
            self.step.add(code.co_filename)
        return True

    def _started(self, code: CodeType, offset: int) -> object:
        # what does not count is not asked about again
        return None if self._note(code) else sys.monitoring.DISABLE

    def _called(self, frame: FrameType, event: str, argument: object) -> None:
        # asked at calls alone, as it returns nothing that would hear of lines
        self._note(frame.f_code)
