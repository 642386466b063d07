"""The working folder of a run: its state, its metrics and its result until OUT appears."""

import json
import os
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from datetime import date
from pathlib import Path
from zipfile import ZipFile

import torch

from mambactl import console
from mambactl.checkpoint.ownership import require_replaceable
from mambactl.checkpoint.partial_folder import REPLACES
from mambactl.checkpoint.publishing import WorkFolder
from mambactl.errors import OutputError, ResourceError
from mambactl.files import LEDGER, PLOT, explained, replacing
from mambactl.foreign import (
    blamed,
    json_value,
    numbered_lines,
    open_regular,
    read_object,
    regular_size,
)
from mambactl.json_values import AnyObject, JsonObject

# of the mark: today for the chat templates of the run
DAY = "day"
_FREE = "free some disk space, then use --resume"
_DAMAGED = "start again with --force"
# bytes that are read at a time
_PIECE = 16 << 20


class RunFolder(WorkFolder):
    """The working folder beside `out`; existence of `out` means that it is complete.

    Beside what every WorkFolder has, it holds state.pt or trainer/ (resumable state), best.pt and
    metrics.jsonl. `identity` (JSON-able) says what the run is.
    """

    def __init__(self, out: Path, identity: AnyObject):
        super().__init__(out, {"stage": None, **identity})
        self.metrics = self.path / LEDGER
        self.plot = self.path / PLOT
        self.side = (LEDGER, PLOT)
        self.trainer = self.path / "trainer"
        # of trackers, which may be watched: where they stay
        self.logs = self.out.with_name(self.out.name + ".logs")
        self._state = self.path / "state.pt"
        self._best = self.path / "best.pt"
        self._entered = False
        # each hears every line of the metrics
        self.listeners: list[Callable[[AnyObject], None]] = []

    def check(self, resume: bool, force: bool, later: Collection[str] = ()) -> None:
        """Raise OutputError where `open` would; what lies there stays as it is.

        That is when something else lies there or at `out`, when another process is at work there,
        when nothing can be written there, when an unfinished run lies there and neither `resume`
        nor `force` is set, or when that run has another identity, but for the keys `later`.
        """
        with _disk(self.path):
            self.require_free()
            require_replaceable(self.out, self._may_replace(resume, force), self.side)
            self._probe()
        self._refuse_other(resume, force, later)

    def _may_replace(self, resume: bool, force: bool) -> bool:
        """True if `out` may exist: with --force, or where a run that was begun with it goes on."""
        return force or (resume and bool((self.read_mark() or {}).get(REPLACES)))

    def _probe(self) -> None:
        folder = self.path
        while not os.path.lexists(folder):
            folder = folder.parent
        # permission bits say too little: of root, of a read-only or a virtual file system
        tempfile.TemporaryFile(dir=folder).close()

    def _refuse_other(self, resume: bool, force: bool, later: Collection[str] = ()) -> None:
        if force or self.disposable:
            return
        if not resume:
            self.refuse_begun()
        before = self.read_mark()
        if before is None:
            raise OutputError(f"{self.path} is no run of this stage", "start again with --force")
        for key in (REPLACES, *later):
            before.pop(key, None)
        changed = differences(before, self.mark)
        if changed:
            raise OutputError(
                f"{self.path} was started differently: {'; '.join(changed)}",
                "resume with the same options, or start again with --force",
            )

    @contextmanager
    def open(self, resume: bool, force: bool) -> Iterator[None]:
        """Create the folder, or enter it again, and lock it.

        A failure before the first state removes it. Raises OutputError like `check`.
        """
        self.check(resume, force)
        with ExitStack() as stack:
            with _disk(self.path):
                stack.enter_context(self.held())
                stack.push(self._leave)
                self._enter(resume, force)
            yield

    def _leave(self, kind: type[BaseException] | None, *_: object) -> None:
        """Clear the folder after a failure if nothing can be resumed from it."""
        if kind is None or not os.path.lexists(self.path) or self.resumable:
            return
        if self._entered or self.disposable:
            self.discard()

    def _enter(self, resume: bool, force: bool) -> None:
        may_replace = self._may_replace(resume, force)
        require_replaceable(self.out, may_replace, self.side)
        self._refuse_other(resume, force)
        if force or self.disposable:
            self.say_what_is_discarded()
            self.wipe()
        self._adopt_result()
        self.begin(may_replace)
        self._entered = True

    def _adopt_result(self) -> None:
        """Rename a result that an earlier version kept under another name."""
        earlier = self.path / self.out.name
        if earlier.is_dir() and earlier != self.trainer and not self.result.exists():
            earlier.rename(self.result)

    @property
    def resumable(self) -> bool:
        """True if a state, answers, a trainer's checkpoint or the result is there."""
        saved = self._state.exists() or self.reference(0).exists() or self.complete
        if saved or self.trainer_checkpoint() is not None:
            return True
        # of processes that are ahead of the main one
        return any(self.path.glob("batch-*.jsonl")) or any(self.result.glob("samples-*"))

    def reference(self, piece: int) -> Path:
        """Path of one piece of a reference model's answers."""
        return self.path / f"reference-{piece:05}.pt"

    def batch(self, number: int) -> Path:
        """Path of a batch of answers whose number has not come yet."""
        return self.path / f"batch-{number:05}.jsonl"

    def trainer_checkpoint(self) -> Path | None:
        """The newest complete checkpoint that a TRL trainer left under `trainer`."""
        # trainer_state.json is written last
        found = {
            int(number): state.parent
            for state in self.trainer.glob("checkpoint-*/trainer_state.json")
            if (number := state.parent.name.removeprefix("checkpoint-")).isdecimal()
        }
        return found[max(found)] if found else None

    def require_intact(self, checkpoint: Path) -> None:
        """Raise OutputError for a damaged file in a trainer's checkpoint, which it would read."""
        files = sorted(checkpoint.iterdir())
        for file in files:
            if file.suffix == ".json":
                read_object(file, OutputError, _DAMAGED)
        archives = [file for file in files if file.suffix in (".pt", ".pth", ".bin")]
        sizes = [regular_size(file, OutputError, _DAMAGED) for file in archives]
        # the state of an optimizer may be larger than the model
        with console.progress("check the saved state", sum(sizes)) as task:
            for file in archives:
                with blamed(file, kind=OutputError, hint=_DAMAGED):
                    _read_through(file, task)

    def save_state(self, state: JsonObject) -> None:
        """Replace the resumable state atomically; raises ResourceError when the disk is full."""
        self._write(self._state, state)

    def load_state(self) -> JsonObject | None:
        """The newest state, or None before the first save."""
        return load_kept(self._state) if self._state.exists() else None

    def save_best(self, state: JsonObject) -> None:
        """Replace what was best so far, in the same way."""
        self._write(self._best, state)

    def load_best(self) -> JsonObject | None:
        """Best state so far; None if none was kept."""
        return load_kept(self._best) if self._best.exists() else None

    def _write(self, path: Path, state: JsonObject) -> None:
        with _disk(self.path), replacing(path) as new, new.open("wb") as file:
            torch.save(state, file)

    def log(self, entry: JsonObject) -> None:
        """Append one line to metrics.jsonl."""
        with _disk(self.path), self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        for listener in self.listeners:
            listener(entry)

    def read_log(self) -> list[JsonObject]:
        """The lines of metrics.jsonl, up to one that a kill tore."""
        found = []
        with open_regular(self.metrics, OutputError, _DAMAGED) as file:
            for _, line in numbered_lines(file, self.metrics, OutputError):
                try:
                    value = json_value(line)
                except ValueError:
                    break
                if not (isinstance(value, dict) and isinstance(value.get("step"), int)):
                    break
                found.append(value)
        return found

    def truncate_log(self, lines: int) -> None:
        """Forget metrics written after the state that a run resumes from."""
        if not self.metrics.exists():
            return
        with open_regular(self.metrics, OutputError, _DAMAGED) as file:
            before = file.read()
        kept = b"".join(before.splitlines(keepends=True)[:lines])
        if kept != before:
            with _disk(self.path), replacing(self.metrics) as new:
                new.write_bytes(kept)


def _read_through(path: Path, task: console.Task) -> None:
    """Read all of a zip archive, which compares its content with its check sums."""
    with ZipFile(path) as archive:
        for name in archive.namelist():
            with archive.open(name) as member:
                while piece := member.read(_PIECE):
                    task.advance(len(piece))


def begun_on(out: Path, resume: bool) -> date | None:
    """Today; where a run at `out` goes on, the day on which it began, None if it kept none."""
    mark = RunFolder(out, {}).read_mark() if resume else None
    if mark is None:
        return date.today()
    try:
        return date.fromisoformat(mark[DAY])
    except (KeyError, TypeError, ValueError):
        return None


def load_kept(path: Path) -> JsonObject:
    """Read a file that a run kept with `torch.save`; raises OutputError if it is damaged."""
    regular_size(path, OutputError, _DAMAGED)
    with blamed(path, kind=OutputError, hint=_DAMAGED):
        return torch.load(path, map_location="cpu", weights_only=True)


class OtherFolder(RunFolder):
    """Substitute for the folder in processes that leave all writing to the main one."""

    def check(self, resume: bool, force: bool, later: Collection[str] = ()) -> None:
        """Do nothing: the main process looks, and ends the run where it may not start."""

    @contextmanager
    def open(self, resume: bool, force: bool) -> Iterator[None]:
        """Enter the block without making, locking or removing anything."""
        yield

    def save_state(self, state: JsonObject) -> None:
        """Do nothing: the processes have the same state."""

    def save_best(self, state: JsonObject) -> None:
        """Do nothing: the main process writes the result."""

    def log(self, entry: JsonObject) -> None:
        """Do nothing: the main process writes the metrics."""

    def truncate_log(self, lines: int) -> None:
        """Do nothing: the main process shortens the metrics."""


@contextmanager
def _disk(path: Path) -> Iterator[None]:
    """Turn failures to write below a folder into sentences."""
    try:
        with explained(path, _FREE):
            yield
    except RuntimeError as error:
        # torch.save reports a short write this way
        raise ResourceError(f"cannot write {path}: {error}", _FREE) from error


def differences(
    before: JsonObject,
    now: JsonObject,
    prefix: str = "",
    defaults: Collection[str] = (),
) -> list[str]:
    """Every key whose value differs, as `key was -> is`; both must be JSON-able.

    Nobody asked for the values of `defaults`, which may be those of another version.
    """
    found = []
    for key in sorted(before.keys() | now.keys()):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += differences(old, new, f"{prefix}{key}.")
        elif old != new:
            why = " (the default)" if key in defaults else ""
            found.append(f"{prefix}{key} {json.dumps(old)} -> {json.dumps(new)}{why}")
    return found
