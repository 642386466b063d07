"""Run a command in a forked child that stops itself right before its n-th change of a file.

What Python does with files is announced to audit hooks before it happens, so that no writer can be
forgotten. Flushing to the disk is not among it: for a process that is killed it changes nothing.
"""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

# seconds after which a child counts as hanging
PATIENCE = 120
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink"}


@dataclass(frozen=True)
class Ended:
    """The end of a child: its exit code (negative: the signal that killed it) and its stderr."""

    code: int
    said: str


class Operations:
    """An audit hook that counts changes of files below a folder; `at` is called before each."""

    def __init__(self, below: Path, at: Callable[[int, str], None]):
        self.below, self.at, self.count, self.active = str(below), at, 0, True

    def __call__(self, event: str, arguments: tuple) -> None:
        if self.active and self._counts(event, arguments):
            # what `at` does with files is not the command's
            self.active = False
            self.count += 1
            self.at(self.count, f"{event} {' '.join(map(str, arguments[:2]))}")
            self.active = True

    def _counts(self, event: str, arguments: tuple) -> bool:
        if event == "open":
            path, mode, flags = arguments
            return self._is_below(path) and bool((flags or 0) & WRITING)
        if event not in CHANGES:
            return False
        path, folder = arguments[0], arguments[-1]
        # inside of shutil.rmtree names are relative to an open folder
        if folder not in (-1, None) and Path("/proc/self/fd").is_dir():
            path = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), path)
        return self._is_below(path)

    def _is_below(self, path: object) -> bool:
        if isinstance(path, bytes):
            path = os.fsdecode(path)
        return isinstance(path, str) and os.path.abspath(path).startswith(self.below)


def run_stopped(
    arguments: list[str], folder: Path, number: int | None, stop: signal.Signals = signal.SIGKILL
) -> Ended:
    """Run a command line in `folder`; with `number`, it stops before that operation."""
    log = folder.with_name(f"{folder.name}.log")

    def stops(count: int, _: str) -> None:
        if count == number:
            os.kill(os.getpid(), stop)

    return _in_child(arguments, folder, log, stops)


def operations_of(arguments: list[str], folder: Path) -> list[str]:
    """Operations on files below `folder` of a command line that ends well, in order."""
    log = folder.with_name(f"{folder.name}.log")
    record = folder.with_name(f"{folder.name}.operations")
    descriptor = os.open(record, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    try:
        ended = _in_child(
            arguments, folder, log, lambda _, what: os.write(descriptor, f"{what}\n".encode())
        )
    finally:
        os.close(descriptor)
    assert ended.code == 0, ended.said
    return record.read_text("utf-8").splitlines()


def _in_child(
    arguments: list[str], folder: Path, log: Path, at: Callable[[int, str], None]
) -> Ended:
    child = os.fork()
    if child == 0:
        code = 70
        try:
            descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            for standard in (1, 2):
                os.dup2(descriptor, standard)
            os.chdir(folder)
            from mambactl.cli.main import run

            sys.stdout, sys.stderr = (os.fdopen(n, "w", closefd=False) for n in (1, 2))
            sys.addaudithook(Operations(folder, at))
            code = run(arguments)
        finally:
            with contextlib.suppress(Exception):
                sys.stderr.flush()
            os._exit(code)
    status = _wait(child)
    return Ended(os.waitstatus_to_exitcode(status), log.read_text("utf-8", errors="replace"))


def _wait(child: int) -> int:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return status
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise AssertionError(f"no end within {PATIENCE} s")
