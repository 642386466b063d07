"""OUT.partial: where a run keeps its state and metrics until OUT appears with one rename."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from mambactl.console import failure_warned
from mambactl.errors import MambactlError, OutputError, ResourceError
from mambactl.files import LEDGER, RUN_FILE, explained, hold, partial_of, replacing
from mambactl.foreign import (
    blamed,
    json_object,
    json_value,
    numbered_lines,
    open_regular,
    read_bytes,
)

_FREE = "free some disk space, then use --resume"


class RunFolder:
    """The working folder beside `out`; existence of `out` means that it is complete.

    Holds run.json (what the run is), state.pt or trainer/ (resumable state), metrics.jsonl, and
    at the end the finished checkpoint under `out`'s own name. `identity` (JSON-able) says what
    the run is.
    """

    def __init__(self, out: Path, identity: dict[str, Any]):
        self.out, self.identity = out, identity
        self.path = partial_of(out)
        self.metrics = self.path / LEDGER
        self.plot = self.path / "metrics.png"
        self.staged = self.path / out.name
        self.trainer = self.path / "trainer"
        # of trackers, which may be watched: where they stay
        self.logs = out.with_name(out.name + ".logs")
        self._identity = self.path / RUN_FILE
        self._state = self.path / "state.pt"

    def check(self, resume: bool, force: bool) -> None:
        """Raise OutputError where `open` would; what lies there stays as it is.

        That is when another process is at work there, when nothing can be written there, when an
        unfinished run lies there and neither `resume` nor `force` is set, or when that run has
        another identity.
        """
        with _disk(self.path):
            self._probe()
        self._refuse_other(resume, force)

    def _probe(self) -> None:
        if self.path.exists():
            os.close(hold(self.path, self.out, folder=self.path.is_dir()))
        folder = self.path
        while not folder.is_dir():
            folder = folder.parent
        # permission bits say too little: of root, of a read-only or a virtual file system
        tempfile.TemporaryFile(dir=folder).close()

    def _refuse_other(self, resume: bool, force: bool) -> None:
        # a kill right after the folder was made leaves it empty
        empty = self.path.is_dir() and not any(self.path.iterdir())
        if force or empty or not self.path.exists():
            return
        if not resume:
            raise OutputError(
                f"{self.path} holds an unfinished run",
                "continue it with --resume, or start again with --force",
            )
        changed = differences(self._read_identity(), self.identity)
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
        with _disk(self.path):
            if force:
                self._discard()
            lock = hold(self.path, self.out, folder=True)
        try:
            with _disk(self.path):
                self._enter(resume, force)
            yield
        except BaseException:
            if not self.resumable:
                _remove(self.path)
            raise
        finally:
            os.close(lock)

    def _discard(self) -> None:
        if self.path.exists():
            lock = hold(self.path, self.out, folder=self.path.is_dir())
            _remove(self.path)
            os.close(lock)

    def _enter(self, resume: bool, force: bool) -> None:
        if self.out.exists() and not force:
            raise OutputError(f"{self.out} exists already", "add --force to replace it")
        self._refuse_other(resume, force)
        _write(self._identity, json.dumps(self.identity, indent=2).encode())

    @property
    def resumable(self) -> bool:
        """Whether a state was saved, or answers of a reference."""
        saved = self._state.exists() or self.reference(0).exists()
        return saved or self.trainer_checkpoint() is not None

    def reference(self, piece: int) -> Path:
        """Where one piece of what a reference model was asked is kept."""
        return self.path / f"reference-{piece:05}.pt"

    def trainer_checkpoint(self) -> Path | None:
        """The newest complete checkpoint that a TRL trainer left under `trainer`."""
        # trainer_state.json is written last
        found = [state.parent for state in self.trainer.glob("checkpoint-*/trainer_state.json")]
        return max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)

    def save_state(self, state: dict[str, Any]) -> None:
        """Replace the resumable state atomically; raises ResourceError when the disk is full."""
        with _disk(self.path), replacing(self._state) as new, new.open("wb") as file:
            torch.save(state, file)

    def load_state(self) -> dict[str, Any] | None:
        """The newest state, or None before the first save."""
        if not self._state.exists():
            return None
        with blamed(self._state, kind=OutputError, hint="start again with --force"):
            return torch.load(self._state, map_location="cpu", weights_only=True)

    def log(self, entry: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl."""
        with _disk(self.path), self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def read_log(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl, up to one that a kill tore."""
        found = []
        with open_regular(self.metrics, OutputError, "start again with --force") as file:
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
        if self.metrics.exists():
            kept = self.metrics.read_text(encoding="utf-8").splitlines(keepends=True)[:lines]
            self.metrics.write_text("".join(kept), encoding="utf-8")

    def publish(self) -> None:
        """Move the staged checkpoint to `out` in one rename and drop everything else.

        Metrics and their plot go into a folder, and beside a single file.
        """
        for file in (self.metrics, self.plot):
            with failure_warned(side_file(self.out, file.name)):
                self._keep(file)
        replaced = self.path / "replaced"
        if self.out.exists():
            self.out.replace(replaced)
        self.staged.replace(self.out)
        _remove(self.path)

    def _keep(self, file: Path) -> None:
        if self.staged.is_dir():
            if file.exists():
                shutil.copyfile(file, self.staged / file.name)
            return
        beside = side_file(self.out, file.name)
        if file.exists():
            file.replace(beside)
        else:
            # what lies there belongs to the result that is being replaced
            beside.unlink(missing_ok=True)

    def _read_identity(self) -> dict[str, Any]:
        try:
            return json_object(read_bytes(self._identity, OutputError), self._identity)
        except MambactlError:
            raise OutputError(
                f"{self.path} is no run of this stage", "start again with --force"
            ) from None


class OtherFolder(RunFolder):
    """The folder as the processes see it that leave all writing to the main one."""

    def check(self, resume: bool, force: bool) -> None:
        """Nothing: the main process looks, and ends the run where it may not start."""

    @contextmanager
    def open(self, resume: bool, force: bool) -> Iterator[None]:
        """Nothing is made, locked or removed."""
        yield

    def save_state(self, state: dict[str, Any]) -> None:
        """Nothing: the processes have the same."""

    def log(self, entry: dict[str, Any]) -> None:
        """Nothing."""

    def truncate_log(self, lines: int) -> None:
        """Nothing."""


def side_file(checkpoint: Path, name: str) -> Path:
    """Where a checkpoint's metrics lie: inside a folder, else beside the file as FILE.name."""
    if checkpoint.is_dir():
        return checkpoint / name
    return checkpoint.with_name(f"{checkpoint.name}.{name}")


@contextmanager
def _disk(path: Path) -> Iterator[None]:
    """Turn failures to write below a folder into sentences."""
    try:
        with explained(path, _FREE):
            yield
    except RuntimeError as error:
        # torch.save reports a short write this way
        raise ResourceError(f"cannot write {path}: {error}", _FREE) from error


def differences(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    """Every key whose value differs, as `key was -> is`; both must be JSON-able."""
    found = []
    for key in sorted(before.keys() | now.keys()):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += differences(old, new, f"{prefix}{key}.")
        elif old != new:
            found.append(f"{prefix}{key} {json.dumps(old)} -> {json.dumps(new)}")
    return found


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        os.fsync(file.fileno())


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
