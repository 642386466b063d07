"""Everything that goes to stderr: log lines, hints, tables and progress.

On a terminal progress is a rich bar; elsewhere it is one plain line every `PLAIN_INTERVAL` seconds.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, Protocol

PLAIN_INTERVAL = 30.0
_verbosity = {"level": 1}


def set_verbosity(level: int) -> None:
    """0 prints warnings and errors only, 1 is normal, 2 adds details."""
    _verbosity["level"] = level


@cache
def stderr() -> Any:
    """The one rich console bound to stderr (colour only on a terminal, honours NO_COLOR)."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, soft_wrap=True)


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

    lines = Table(title=title or None, title_justify="left", box=box.SIMPLE_HEAD)
    for position, column in enumerate(columns):
        justify = "right" if numbers and position > 0 else "left"
        lines.add_column(column, justify=justify, overflow="fold")
    for row in rows:
        lines.add_row(*(Text(str(cell)) for cell in row))
    return lines


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print a table to stderr; numbers should arrive already formatted."""
    if _verbosity["level"] >= 1:
        stderr().print(grid(title, columns, rows, numbers=True))


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
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[status]}"),
    )
    with Progress(*columns, console=stderr(), transient=True) as bar:
        yield _BarTask(bar, label, total)
