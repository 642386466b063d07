"""Everything that goes to stderr: log lines, hints, tables and progress.

On a terminal progress is a rich bar; elsewhere it is one plain line every `PLAIN_INTERVAL` seconds.
"""

import io
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, Protocol

PLAIN_INTERVAL = 30.0
# columns of a table in a log, where there is no terminal that has a width
LOG_WIDTH = 140
# set for the stages of a recipe: their result is JSON, their errors are read by a person
PLAIN_ERRORS = "_MAMBACTL_PLAIN_ERRORS"
# below every level: for the processes of a run that leave talking to the main one
SILENT = -1
# as a library; the command line asks for more
_verbosity = {"level": 0}


class _Forgiving(io.TextIOWrapper):
    """A stderr that may go away: what nobody can read any more is no reason to stop working."""

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError:
            self._give_up()
            return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except OSError:
            self._give_up()

    def _give_up(self) -> None:
        # what is buffered must not fail again at exit, nor in a library that writes by itself
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), self.fileno())


def secure_streams() -> None:
    """Make stdout and stderr exist, and stderr survive a reader that went away or a full disk."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            # a closed descriptor would be given to the next file, a checkpoint perhaps; the
            # lowest free one is taken, so this opens exactly the one that is missing
            os.open(os.devnull, os.O_RDWR)
    # streams live as long as the process
    if sys.stdout is None:
        sys.stdout = os.fdopen(1, "w", closefd=False)
    buffer = os.fdopen(2, "wb", closefd=False) if sys.stderr is None else sys.stderr.buffer
    sys.stderr = _Forgiving(buffer, "utf-8", errors="backslashreplace", line_buffering=True)


def set_verbosity(level: int) -> None:
    """Choose what is said on stderr: 0 warnings only, 1 results and progress, 2 details as well.

    Python starts at 0, the command line at 1.

    >>> mambactl.set_verbosity(0)
    """
    _verbosity["level"] = level


def verbosity() -> int:
    """The level that `set_verbosity` chose."""
    return _verbosity["level"]


@contextmanager
def silenced() -> Iterator[None]:
    """Say nothing meanwhile: of what will be said again."""
    before = _verbosity["level"]
    set_verbosity(SILENT)
    try:
        yield
    finally:
        set_verbosity(before)


@cache
def stderr() -> Any:
    """The one rich console bound to stderr (colour only on a terminal, honours NO_COLOR)."""
    from rich.console import Console

    # a stderr that is no terminal may still be seen in one: COLUMNS says how wide it is
    wide = sys.stderr.isatty() or os.environ.get("COLUMNS", "").isdigit()
    width = None if wide else LOG_WIDTH
    return Console(stderr=True, highlight=False, soft_wrap=True, emoji=False, width=width)


def log(message: str, level: int = 1) -> None:
    """Print one plain line to stderr."""
    if _verbosity["level"] >= level:
        stderr().print(message, markup=False)


def warn(message: str) -> None:
    """Print a warning that even `-q` shows."""
    log(f"warning: {message}", level=0)


def grid(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], numbers: bool) -> Any:
    """Return a rich table of plain text; with `numbers` all columns but the first align right."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    # text, because rich would read [tags] and :emoji: in a plain string
    heading = Text(title, style="table.title") if title else None
    lines = Table(title=heading, title_justify="left", box=box.SIMPLE_HEAD)
    for position, column in enumerate(columns):
        justify = "right" if numbers and position > 0 else "left"
        lines.add_column(column, justify=justify, overflow="fold")
    for row in rows:
        lines.add_row(*(Text(str(cell)) for cell in row))
    return lines


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print a table to stderr; numbers should arrive already formatted."""
    show(grid(title, columns, rows, numbers=True))


def show(content: Any) -> None:
    """Print something that rich can render to stderr."""
    if _verbosity["level"] >= 1:
        stderr().print(content)


class Task(Protocol):
    """What `progress` yields: advance by some amount, optionally showing a status text."""

    def advance(self, amount: float = 1, status: str = "") -> None: ...


class _PlainTask:
    def __init__(self, label: str, total: float):
        self.label, self.total, self.done, self.last = label, total, 0.0, time.monotonic()

    def advance(self, amount: float = 1, status: str = "") -> None:
        self.done += amount
        now = time.monotonic()
        if now - self.last >= PLAIN_INTERVAL:
            self.last = now
            log(f"{self.label}: {self.done:g}/{self.total:g} {status}".rstrip())


class _BarTask:
    def __init__(self, bar: Any, label: str, total: float):
        self.bar = bar
        self.task = bar.add_task(label, total=total, status="")

    def advance(self, amount: float = 1, status: str = "") -> None:
        self.bar.update(self.task, advance=amount, status=status)


@contextmanager
def progress(label: str, total: float) -> Iterator[Task]:
    """Show how far a long piece of work is; `total` is in the unit passed to `advance`."""
    if _verbosity["level"] < 1 or not stderr().is_terminal:
        yield _PlainTask(label, total)
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[status]}", markup=False),
    )
    with Progress(*columns, console=stderr(), transient=True) as bar:
        yield _BarTask(bar, label, total)
