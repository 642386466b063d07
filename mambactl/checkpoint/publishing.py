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

import fcntl
import json
import os
import signal
import stat
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from mambactl import console
from mambactl.checkpoint.exchange import exchange, rename_new
from mambactl.checkpoint.ownership import located, require_replaceable
from mambactl.errors import MambactlError, OutputError
from mambactl.files import (
    LEDGER,
    LINEAGE,
    PARTIAL,
    PLOT,
    RESULTS,
    RUN_FILE,
    SINGLE_FILE_SUFFIXES,
    explained,
    partial_of,
    remove,
    replacing,
    sync_folder,
    temporary_of,
)
from mambactl.foreign import json_object, read_text

FINISHED = "finished.json"
# the mark of a writer that has nothing to resume
DISPOSABLE = {"stage": "checkpoint"}
# of what a command keeps in the folder: everything that may be deleted with it
KEPT = (
    *("result", "replaced", "state.pt", "trainer", "before.json", "reference-*.pt"),
    *("decoded.partial", LEDGER, PLOT, LINEAGE, temporary_of(Path("*")).name),
)
_FOREIGN_HINT = "move it away, or choose another -o"
_SPACE = "free some disk space, then use --resume"


class WorkFolder:
    """The folder beside `out` in which a command writes; its states are those of the module.

    `mark` (JSON-able) says what the command is; `side` names what will lie beside `out` or, if
    `out` is a folder, in it, with the file of this folder that it is made of.
    """

    def __init__(self, out: Path, mark: Mapping[str, Any]):
        self.out = located(out)
        self.mark = dict(mark)
        self.single = self.out.suffix in SINGLE_FILE_SUFFIXES
        self.path = partial_of(self.out)
        self.result = self.path / "result"
        self.side: dict[str, Path] = {}
        self.may_replace = False
        self._mark = self.path / RUN_FILE
        self._finished = self.path / FINISHED
        self._replaced = self.path / "replaced"

    @property
    def complete(self) -> bool:
        """Whether the result is complete and only needs to be published."""
        finished = _object(self._finished)
        return finished is not None and os.path.lexists(self.result) and not self._is_out(finished)

    @property
    def published(self) -> bool:
        """Whether OUT is what was made here, and only clearing is left."""
        finished = _object(self._finished)
        if finished is None or not os.path.lexists(self.out):
            return False
        return self._is_out(finished) or not os.path.lexists(self.result)

    def _is_out(self, finished: Mapping[str, Any]) -> bool:
        with suppress(FileNotFoundError):
            return os.lstat(self.out).st_ino == finished.get("inode")
        return False

    def read_mark(self) -> dict[str, Any] | None:
        """The mark that lies there; None where there is none of ours."""
        found = _object(self._mark)
        return found if found is not None and "stage" in found else None

    @property
    def begun(self) -> bool:
        """Whether more than a mark lies there."""
        if not self.path.is_dir():
            return False
        return any(not name.startswith(RUN_FILE) for name in os.listdir(self.path))

    @property
    def disposable(self) -> bool:
        """Whether nothing lies there that took long to make."""
        found = self.read_mark() or DISPOSABLE
        return not self.begun or found["stage"] == DISPOSABLE["stage"]

    @property
    def goes_on(self) -> bool:
        """Whether an unfinished run lies there that was begun with leave to replace OUT."""
        found = self.read_mark()
        resumes = found is not None and found["stage"] != DISPOSABLE["stage"]
        return resumes and bool(found.get("replaces"))

    def say_what_is_discarded(self) -> None:
        """Name the run whose work `wipe` would delete, if there is one."""
        if not self.disposable:
            stage = (self.read_mark() or {}).get("stage")
            state = "finished" if self.complete else "unfinished"
            console.log(f"--force discards the {state} run of {stage} in {self.path}")

    def require_own(self) -> None:
        """Raise OutputError where something lies at the folder's name that is not ours."""
        try:
            status = os.lstat(self.path)
        except FileNotFoundError:
            return
        if not stat.S_ISDIR(status.st_mode):
            raise OutputError(f"{self.path} is no folder of mambactl", _FOREIGN_HINT)
        entries = list(os.scandir(self.path))
        links = [entry.path for entry in entries if entry.is_symlink()]
        if links:
            raise OutputError(f"{links[0]} is a symbolic link", _FOREIGN_HINT)
        # a kill may leave the folder empty, or the mark half written
        begun = {entry.name for entry in entries} <= {temporary_of(self._mark).name}
        if not begun and self.read_mark() is None and _object(self._finished) is None:
            raise OutputError(f"{self.path} holds what no command of ours left", _FOREIGN_HINT)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Make the folder if need be, lock it, and finish what a stopped command left.

        Raises OutputError when another process holds it, or when it is not ours.
        """
        while True:
            with suppress(FileExistsError):
                self.path.mkdir(parents=True)
            fd = self._lock()
            if fd is None:
                continue
            try:
                self.require_own()
                if not self._settle():
                    yield
                    return
            finally:
                os.close(fd)

    def require_free(self) -> None:
        """Raise OutputError like `held`, but make nothing."""
        self.require_own()
        if os.path.lexists(self.path) and (fd := self._lock()) is not None:
            os.close(fd)

    def _lock(self) -> int | None:
        """The lock as an open file; None where the folder has just been removed or renamed."""
        try:
            fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except FileNotFoundError:
            return None
        except OSError:
            self.require_own()
            raise
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(fd), os.lstat(self.path)):
                return fd
        except FileNotFoundError:
            pass
        except BlockingIOError as error:
            os.close(fd)
            raise OutputError(
                f"another process is writing {self.out}", "wait for it, or choose another -o"
            ) from error
        os.close(fd)
        return None

    def settle(self) -> None:
        """Finish what a stopped command left, if that is all that is left to do here."""
        # whoever needs the folder will say what is wrong with it
        with suppress(OutputError):
            self.require_own()
            if os.path.lexists(self.path) and (fd := self._lock()) is not None:
                try:
                    if not self._settle() and os.path.lexists(self.out) and not self.begun:
                        self.discard()
                finally:
                    os.close(fd)

    def _settle(self) -> bool:
        """Whether the folder is gone, because what was made in it is published."""
        if self.published:
            self._clear()
        elif self._replaced_in_between():
            self.publish()
        return not os.path.lexists(self.path)

    def _replaced_in_between(self) -> bool:
        """Restore what was replaced by nothing yet, if so; True where its successor is there."""
        if os.path.lexists(self.out) or not os.path.lexists(self._replaced):
            return False
        if self.complete:
            return True
        self._replaced.rename(self.out)
        return False

    def begin(self, may_replace: bool) -> None:
        """Write the mark; what was complete before is not any more. The caller holds the folder."""
        self.may_replace = may_replace
        self._finished.unlink(missing_ok=True)
        self._write_mark(self.mark | {"replaces": may_replace})

    def _write_mark(self, content: Mapping[str, Any]) -> None:
        with replacing(self._mark) as new:
            new.write_text(json.dumps(content, indent=2), "utf-8")

    def finish(self) -> None:
        """Record that the result is complete; the caller has flushed its files to the disk."""
        found = {name: source for name, source in self.side.items() if source.exists()}
        if self.result.is_dir():
            for name, source in found.items():
                with console.failure_warned(self.out / name):
                    _put_into(self.result, name, source)
            sync_folder(self.result)
            beside, absent = {}, []
        else:
            beside = {name: source.name for name, source in found.items()}
            absent = sorted(self.side.keys() - found.keys())
        sync_folder(self.path)
        record = {"inode": os.lstat(self.result).st_ino, "side": beside, "absent": absent}
        with replacing(self._finished) as new:
            new.write_text(json.dumps(record), "utf-8")
        sync_folder(self.path)

    def publish(self) -> None:
        """Let the result appear as OUT in one step, then do all that is left to do.

        Signals wait until it is done. Raises OutputError where OUT may not be replaced.
        """
        with explained(self.out, _SPACE), signals_deferred():
            mark = self.read_mark() or {}
            force = self.may_replace or bool(mark.get("replaces"))
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
            self.out.rename(self._replaced)
            try:
                self.result.rename(self.out)
            except BaseException:
                self._replaced.rename(self.out)
                raise

    def _clear(self) -> None:
        """Do what is left after OUT has appeared."""
        finished = _object(self._finished) or {}
        for name, source in finished.get("side", {}).items():
            target = self.out.with_name(f"{self.out.name}.{name}")
            if (self.path / source).exists():
                with console.failure_warned(target):
                    os.replace(self.path / source, target)
        for name in finished.get("absent", []):
            # what lies there belongs to the result that was replaced
            target = self.out.with_name(f"{self.out.name}.{name}")
            with console.failure_warned(target):
                target.unlink(missing_ok=True)
        for old in (self.result, self._replaced):
            self._keep_measurements(old)
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
        console.log(f"measurements of the checkpoint that was replaced are in {kept}")

    def discard(self) -> None:
        """Delete what commands keep in the folder, and the folder where nothing else is in it."""
        self.wipe()
        if others := os.listdir(self.path):
            console.warn(f"{self.path} stays: it holds {min(others)}, which mambactl did not write")
            return
        self.path.rmdir()
        with suppress(OSError):
            sync_folder(self.path.parent)

    def wipe(self) -> None:
        """Delete what commands keep in the folder."""
        if self.begun and not self.published:
            # a run that is half deleted must not be resumed, or taken for complete
            self._finished.unlink(missing_ok=True)
            self._write_mark(DISPOSABLE)
        # last what says whose it is: whatever a kill leaves is still known as ours
        last = (RUN_FILE, FINISHED)
        # and where earlier versions kept what was not complete
        earlier = (self.out.name, f"{self.out.name}{PARTIAL}", f"state.pt{PARTIAL}")
        for name in sorted(set(os.listdir(self.path)) - set(last)):
            if name in earlier or any(fnmatch(name, pattern) for pattern in KEPT):
                remove(self.path / name)
        for name in last:
            (self.path / name).unlink(missing_ok=True)


def settle(out: Path) -> None:
    """Finish what a stopped command left of publishing `out`; quick where there is nothing."""
    with explained(out, _SPACE):
        WorkFolder(out, {}).settle()


def _object(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file of the folder; None where there is none."""
    try:
        return json_object(read_text(path), path)
    except MambactlError:
        return None


def _put_into(folder: Path, name: str, source: Path) -> None:
    """Give a folder a file of its own; where links are possible this needs no space."""
    target = folder / name
    remove(target)
    if not source.exists():
        return
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
    before: dict[int, Any] = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, lambda number, _: arrived.append(number))
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        if arrived:
            signal.raise_signal(arrived[0])
