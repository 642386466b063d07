"""OUT.partial, the folder in which a command writes: whose it is, who holds it, what lies there."""

import fcntl
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path

from mambactl import console
from mambactl.checkpoint.ownership import located
from mambactl.errors import MambactlError, OutputError
from mambactl.files import (
    LEDGER,
    LINEAGE,
    PARTIAL,
    PLOT,
    RUN_FILE,
    SINGLE_FILE_SUFFIXES,
    partial_of,
    remove,
    replacing,
    sync_folder,
    temporary_of,
)
from mambactl.foreign import read_object
from mambactl.json_values import AnyObject, JsonObject

FINISHED = "finished.json"
# in every mark: whether the command was begun with leave to replace OUT
REPLACES = "replaces"
# the mark of a writer that has nothing to resume
DISPOSABLE = {"stage": "checkpoint", REPLACES: False}
# one of these is in every mark of ours: the second in those of earlier versions
_OURS = {REPLACES, "source_sha256"}
# of what a command keeps in the folder: everything that may be deleted with it
KEPT = (
    *("result", "replaced", "state.pt", "best.pt", "trainer", "before.json", "tokens.json"),
    *(
        "reference-*.pt",
        "decoded.partial",
        "batch-*.jsonl",
        LEDGER,
        PLOT,
        LINEAGE,
        temporary_of(Path("*")).name,
    ),
)
_FOREIGN_HINT = "move it away, or choose another -o"


class PartialFolder:
    """The folder beside `out` in which a command writes; `publishing` says what its states are.

    `mark` (JSON-able) says what the command is; `side` names files of this folder that will lie
    beside `out` or, if `out` is a folder, in it.
    """

    def __init__(self, out: Path, mark: AnyObject):
        self.out = located(out)
        self.mark = dict(mark)
        self.single = self.out.suffix in SINGLE_FILE_SUFFIXES
        self.side: tuple[str, ...] = ()
        self.may_replace = False
        self.path = partial_of(self.out)
        self._mark = self.path / RUN_FILE
        # what is being written, that it is complete, and what it takes the place of
        self.result = self.path / "result"
        self.record = self.path / FINISHED
        self.replaced = self.path / "replaced"

    @property
    def complete(self) -> bool:
        """Return whether the result is complete but not published yet."""
        finished = json_of(self.record)
        return finished is not None and os.path.lexists(self.result) and not self._is_out(finished)

    @property
    def published(self) -> bool:
        """True if OUT is what was made here, and only clearing is left."""
        finished = json_of(self.record)
        if finished is None or not os.path.lexists(self.out):
            return False
        return self._is_out(finished) or not os.path.lexists(self.result)

    def _is_out(self, finished: AnyObject) -> bool:
        with suppress(FileNotFoundError):
            return os.lstat(self.out).st_ino == finished.get("inode")
        return False

    def read_mark(self) -> JsonObject | None:
        """The mark that lies there; None where there is none of ours."""
        found = json_of(self._mark)
        ours = found is not None and "stage" in found and not _OURS.isdisjoint(found)
        return found if ours else None

    @property
    def begun(self) -> bool:
        """True if the folder holds more than a mark."""
        if not self.path.is_dir():
            return False
        return any(not name.startswith(RUN_FILE) for name in os.listdir(self.path))

    @property
    def disposable(self) -> bool:
        """True if the folder holds nothing that took long to make."""
        found = self.read_mark() or DISPOSABLE
        return not self.begun or found["stage"] == DISPOSABLE["stage"]

    @property
    def goes_on(self) -> bool:
        """True if the folder holds an unfinished run that was begun with leave to replace OUT."""
        found = self.read_mark()
        if found is None or found["stage"] == DISPOSABLE["stage"]:
            return False
        return bool(found.get(REPLACES))

    def refuse_begun(self) -> None:
        """Raise OutputError where a run lies that could be resumed."""
        if not self.disposable:
            state = "a finished run that is not published" if self.complete else "an unfinished run"
            raise OutputError(
                f"{self.path} holds {state}",
                "continue it with --resume, or start again with --force",
            )

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
        if not begun and self.read_mark() is None and json_of(self.record) is None:
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

    def _settle(self) -> bool:
        """Finish what a stopped command left; return True if the folder is gone after that."""
        raise NotImplementedError

    def begin(self, may_replace: bool) -> None:
        """Write the mark; what was complete before is not any more. The caller holds the folder."""
        self.may_replace = may_replace
        self.record.unlink(missing_ok=True)
        self._write_mark(self.mark | {REPLACES: may_replace})

    def _write_mark(self, content: AnyObject) -> None:
        with replacing(self._mark) as new:
            new.write_text(json.dumps(content, indent=2), "utf-8")

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
            self.record.unlink(missing_ok=True)
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


def json_of(path: Path) -> JsonObject | None:
    """The JSON object in a file of the folder; None where there is none."""
    try:
        return read_object(path)
    except MambactlError:
        return None
