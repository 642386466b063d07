"""OUT.partial: the one folder in which OUT is made, and the one order in which OUT appears.

What lies in the folder says how far a command came:

- nothing, or the mark `run.json`: nothing is complete;
- `finished.json` as well: `result` is complete. Unless OUT is the very file or folder that
  `finished.json` names, OUT is what it was before;
- OUT is what `finished.json` names: it is published, and the rest of the work is left to do:
  files beside OUT move there, what was replaced is deleted, and last the folder.

A process that is killed between any two operations leaves one of these, from which the next
command on OUT goes on. Only a system that cannot exchange two names has a moment without a folder
that is replaced; then `replaced` holds it.
"""

import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from mambactl import console
from mambactl.checkpoint.exchange import exchange, rename_new
from mambactl.checkpoint.ownership import require_replaceable
from mambactl.checkpoint.partial_folder import REPLACES, PartialFolder, json_of
from mambactl.errors import OutputError
from mambactl.files import (
    LEDGER,
    LINEAGE,
    PLOT,
    RESULTS,
    explained,
    remove,
    replacing,
    sync_folder,
)

# what may lie beside a single file; the working folder has each under the same name
SIDES = (LEDGER, PLOT, LINEAGE)
_SPACE = "free some disk space, then use --resume"


class WorkFolder(PartialFolder):
    """The folder of a command, and how its result appears as OUT."""

    def settle(self) -> None:
        """Finish what a stopped command left, if that is all that is left to do here."""
        # whoever needs the folder will say what is wrong with it
        with suppress(OutputError):
            self.require_own()
            if os.path.lexists(self.path) and (fd := self._lock()) is not None:
                try:
                    # a run that has only its mark goes on where it may replace OUT
                    idle = not (self.begun or self.goes_on)
                    if not self._settle() and idle and os.path.lexists(self.out):
                        self.discard()
                finally:
                    os.close(fd)

    def _settle(self) -> bool:
        """Finish or undo a publication that was stopped; return True if the folder is gone."""
        if self.published:
            self._clear()
        elif self._replaced_in_between():
            self.publish()
        return not os.path.lexists(self.path)

    def _replaced_in_between(self) -> bool:
        """Restore what was replaced by nothing yet, if so; True where its successor is there."""
        if os.path.lexists(self.out) or not os.path.lexists(self.replaced):
            return False
        if self.complete:
            return True
        self.replaced.rename(self.out)
        return False

    def finish(self) -> None:
        """Record that the result is complete; the caller has flushed its files to the disk."""
        found = [name for name in self.side if (self.path / name).exists()]
        if self.result.is_dir():
            for name in found:
                with console.failure_warned(self.out / name):
                    _put_into(self.result, self.path / name)
            sync_folder(self.result)
        beside = [] if self.result.is_dir() else found
        absent = [] if self.result.is_dir() else [name for name in self.side if name not in found]
        sync_folder(self.path)
        record = {"inode": os.lstat(self.result).st_ino, "beside": beside, "absent": absent}
        with replacing(self.record) as new:
            new.write_text(json.dumps(record), "utf-8")
        sync_folder(self.path)

    def publish(self) -> None:
        """Let the result appear as OUT in one step, then do all that is left to do.

        Signals wait until it is done. Raises OutputError where OUT may not be replaced.
        """
        with explained(self.out, _SPACE), signals_deferred():
            mark = self.read_mark() or {}
            force = self.may_replace or bool(mark.get(REPLACES))
            require_replaceable(self.out, force, self.side)
            self._appear()
            sync_folder(self.out.parent)
            self._clear()

    def _appear(self) -> None:
        if not os.path.lexists(self.out):
            rename_new(self.result, self.out)
        elif exchange(self.result, self.out):
            # the result's name is now that of what was replaced
            return
        elif self.result.is_file() and self.out.is_file():
            os.replace(self.result, self.out)
        else:
            self.out.rename(self.replaced)
            try:
                self.result.rename(self.out)
            except BaseException:
                self.replaced.rename(self.out)
                raise

    def _clear(self) -> None:
        """Do what is left after OUT has appeared."""
        finished = json_of(self.record) or {}
        for name in SIDES:
            target = self.out.with_name(f"{self.out.name}.{name}")
            with console.failure_warned(target):
                if name in finished.get("beside", ()) and (self.path / name).exists():
                    os.replace(self.path / name, target)
                elif name in finished.get("absent", ()):
                    # what lies there belongs to the result that was replaced
                    target.unlink(missing_ok=True)
        for old in (self.result, self.replaced):
            self._keep_measurements(old)
            remove(old)
        if any((self.path / name).exists() for name in finished.get("beside", ())):
            console.warn(f"what could not be moved beside {self.out} is in {self.path}")
        else:
            self.discard()

    def _keep_measurements(self, replaced: Path) -> None:
        """Move what was measured of a replaced folder beside OUT."""
        results = replaced / RESULTS
        if not results.is_dir() or not any(results.iterdir()):
            return
        number, kept = 1, self.out.with_name(f"{self.out.name}.{RESULTS}-replaced")
        while os.path.lexists(kept):
            number += 1
            kept = self.out.with_name(f"{self.out.name}.{RESULTS}-replaced-{number}")
        results.rename(kept)
        console.log(f"measurements of the checkpoint that was replaced are in {kept}", level=0)


def settle(out: Path) -> None:
    """Finish what a stopped command left of publishing `out`; quick where there is nothing."""
    with explained(out, _SPACE):
        WorkFolder(out, {}).settle()


def _put_into(folder: Path, source: Path) -> None:
    """Give a folder a file of its own; where links are possible this needs no space."""
    target = folder / source.name
    remove(target)
    try:
        os.link(source, target)
    except OSError:
        with replacing(target) as new:
            new.write_bytes(source.read_bytes())


@contextmanager
def signals_deferred() -> Iterator[None]:
    """Let SIGINT and SIGTERM wait until the block is done; then the first one is delivered.

    Outside the main thread signals are left alone.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived: list[int] = []
    before: dict[int, signal.Handlers | int | Callable[[int, FrameType | None], object] | None] = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, lambda number, _: arrived.append(number))
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        if arrived:
            signal.raise_signal(arrived[0])
