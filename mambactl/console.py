"""Everything that goes to stderr: log lines, hints, tables and progress.

On a terminal progress is a rich bar; elsewhere it is one plain line every `PLAIN_INTERVAL` seconds.
"""

import io
import json
import os
import re
import stat
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from functools import cache, partial
from io import StringIO
from pathlib import Path
from typing import Any, Protocol

from mambactl.errors import ModelError, ResourceError, UpstreamError, UsageError
from mambactl.present import present
from mambactl.stage_result import Table

PLAIN_INTERVAL = 8.0
# columns of a table in a log, where there is no terminal that has a width
LOG_WIDTH = 140
# set for the stages of a recipe: their result is JSON, their errors are read by a person
PLAIN_ERRORS = "_MAMBACTL_PLAIN_ERRORS"
# below every level: for the processes of a run that leave talking to the main one
SILENT = -1
# as a library; the command line asks for more
_verbosity = {"level": 0}
# what titles of tables begin with
_stage = {"name": ""}
# what is being done, outermost first, and when stderr last said something (monotonic seconds)
_activities: list[Callable[[], str]] = []
_heard = {"at": time.monotonic()}
_bars = {"open": 0}
# what guarded_stdout keeps of the real one, for commands that write text piece by piece
_stdout: dict[str, int | None] = {"text": None, "whole": 1}


# control characters but tab and line feed, those that turn the direction of text, separators that
# some terminals take for a new line, and halves of a character
_UNPRINTABLE = re.compile(
    "[\0-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)
# characters of what a stage says on stdout, with all its metrics
_LONGEST_LINE = 1 << 24
_CURSOR_UP = "\x1b[A"


def printable(text: str) -> str:
    """Text whose names may come from a file, with \\u001b for what a terminal would obey.

    JSON with such characters stays the same JSON.
    """
    return _UNPRINTABLE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


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


class _Harmless(_Forgiving):
    """A stderr for all that libraries write: warnings and bars may hold names from files.

    `terminal` is the same stderr for what this program draws itself.
    """

    def __init__(self, terminal: _Forgiving):
        super().__init__(terminal.buffer, "utf-8", errors="backslashreplace", line_buffering=True)
        self.terminal = terminal

    def write(self, text: str) -> int:
        # bars begin their line anew, and move up where there are several of them
        lines = text.replace(_CURSOR_UP, "").split("\r")
        super().write("\r".join(map(printable, lines)))
        return len(text)


def secure_streams() -> None:
    """Make stdout and stderr exist, and stderr survive a reader that went away or a full disk.

    What a library writes there obeys no terminal.
    """
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
    sys.stderr = _Harmless(
        _Forgiving(buffer, "utf-8", errors="backslashreplace", line_buffering=True)
    )


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
    # names arrive here as `printable` leaves them; the colours are our own
    file = sys.stderr.terminal if isinstance(sys.stderr, _Harmless) else None
    return Console(
        file=file, stderr=True, highlight=False, soft_wrap=True, emoji=False, width=width
    )


def log(message: str, level: int = 1) -> None:
    """Print one plain line to stderr."""
    if _verbosity["level"] >= level:
        _heard["at"] = time.monotonic()
        stderr().print(printable(message), markup=False)


def warn(message: str) -> None:
    """Print a warning that even `-q` shows."""
    log(f"warning: {message}", level=0)


@contextmanager
def failure_warned(file: Path | str) -> Iterator[None]:
    """Make any failure to write `file`, which is beside a result, not part of it, a warning."""
    try:
        yield
    except Exception as error:
        warn_unwritten(file, error)


def warn_unwritten(file: Path | str, error: Exception) -> None:
    """Warn of a file beside a result; with MAMBACTL_DEBUG=1 the traceback is shown as well."""
    if os.environ.get("MAMBACTL_DEBUG") == "1":
        log("".join(traceback.format_exception(error)).rstrip(), level=0)
    warn(f"{file} is not written ({type(error).__name__}: {error})")


def grid(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], numbers: bool
) -> Any:
    """Return a rich table of plain text; with `numbers` all columns but the first align right."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    # text, because rich would read [tags] and :emoji: in a plain string
    heading = Text(printable(title), style="table.title") if title else None
    lines = Table(title=heading, title_justify="left", box=box.SIMPLE_HEAD)
    for position, column in enumerate(columns):
        justify = "right" if numbers and position > 0 else "left"
        lines.add_column(Text(printable(column)), justify=justify, overflow="fold")
    for row in rows:
        lines.add_row(*(Text(printable(str(cell))) for cell in row))
    return lines


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table to stderr; numbers should arrive already formatted."""
    stage = _stage["name"]
    named = ": ".join(filter(None, (stage, title)))
    show(grid(named, columns, rows, numbers=True))


def name_tables(stage: str) -> None:
    """Put the name of a stage before the titles of tables: other stages share the terminal."""
    _stage["name"] = stage


def show(content: object, level: int = 1) -> None:
    """Print something that rich can render to stderr."""
    if _verbosity["level"] >= level:
        _heard["at"] = time.monotonic()
        stderr().print(content)


@contextmanager
def doing(what: str | Callable[[], str]) -> Iterator[None]:
    """Name a piece of work: where it takes long, `heartbeat` says that it still goes on."""
    activity = what if callable(what) else partial(str, what)
    _activities.append(activity)
    try:
        yield
    finally:
        _activities.remove(activity)


@contextmanager
def attended() -> Iterator[None]:
    """Say nothing of long work meanwhile: a person types, or sees it go on."""
    _bars["open"] += 1
    try:
        yield
    finally:
        _bars["open"] -= 1
        _heard["at"] = time.monotonic()


def activity() -> str:
    """The innermost piece of work that is going on."""
    return next((each() for each in reversed(_activities[:])), "")


def silent_since() -> float:
    """Seconds since something was last said; 0 while a bar on a terminal moves by itself."""
    return 0.0 if _bars["open"] else time.monotonic() - _heard["at"]


class Task(Protocol):
    """Handle that `progress` yields: advance by an amount, optionally showing a status text."""

    def advance(self, amount: float = 1, status: str = "") -> None: ...


class _PlainTask:
    def __init__(self, label: str, total: float):
        self.label, self.total, self.done, self.last = label, total, 0.0, time.monotonic()

    def advance(self, amount: float = 1, status: str = "") -> None:
        self.done += amount
        now = time.monotonic()
        if now - self.last >= PLAIN_INTERVAL:
            self.last = now
            log(f"{self.state()} {status}".rstrip())

    def state(self) -> str:
        """Progress so far, as text."""
        return f"{self.label}: {self.done:g}/{self.total:g}"


class _BarTask:
    def __init__(self, bar: Any, label: str, total: float):
        self.bar = bar
        self.task = bar.add_task(printable(label), total=total, status="")

    def advance(self, amount: float = 1, status: str = "") -> None:
        self.bar.update(self.task, advance=amount, status=printable(status))


@contextmanager
def progress(label: str, total: float) -> Iterator[Task]:
    """Show how far a long piece of work is; `total` is in the unit passed to `advance`."""
    if _verbosity["level"] < 1 or not stderr().is_terminal:
        task = _PlainTask(label, total)
        with doing(task.state):
            yield task
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
    with Progress(*columns, console=stderr(), transient=True) as bar, attended():
        yield _BarTask(bar, label, total)


@contextmanager
def guarded_stdout(texts: bool = False) -> Iterator[None]:
    """Point descriptor 1 at stderr, so that no library (Python or C) can write to the pipe.

    With `texts` the command inside may write text there piece by piece: `text_descriptor`.
    """
    sys.stdout.flush()
    saved, before = os.dup(1), dict(_stdout)
    os.dup2(2, 1)
    _stdout.update(text=saved if texts else None, whole=saved)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        _stdout.update(before)
        os.dup2(saved, 1)
        os.close(saved)


def text_descriptor() -> int | None:
    """Descriptor for text that is streamed; None if the command may print only a result."""
    return _stdout["text"]


def announce_result(text: str, content: Mapping[str, object]) -> None:
    """Write what a command has to say before it ends: the text, or with --json the object."""
    if _stdout["text"] is None:
        write_json(content, present(_stdout["whole"]))
    else:
        write_out(text, _stdout["text"])


def write_out(text: str, descriptor: int = 1) -> None:
    """Write text and one newline to stdout; a reader that went away is not an error.

    A terminal sees escapes as text, whatever a model or a file said; a file gets them as they are.
    """
    write_piece(text.rstrip("\n") + "\n", descriptor)


def write_piece(text: str, descriptor: int = 1) -> None:
    """Write text to stdout as `write_out` does, without an end of the line."""
    if os.isatty(descriptor):
        text = printable(text)
    data = text.encode()
    _heard["at"] = time.monotonic()
    sys.stdout.flush()
    try:
        while data:
            data = data[os.write(descriptor, data) :]
    except BrokenPipeError:
        # nobody reads any more; the interpreter must not fail again when it flushes at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
    except OSError as error:
        # the work itself is done: what it gave must not be lost
        raise ResourceError(
            f"cannot write to stdout: {error.strerror}",
            f"everything else is done; stdout should have said: {text.rstrip()}",
        ) from error


def write_json(content: Mapping[str, object], descriptor: int = 1) -> None:
    """Write one JSON object on one line to stdout."""
    write_out(printable(json.dumps(content, ensure_ascii=False, default=str)), descriptor)


def read_model(model: str) -> str:
    """Return the model argument; `-` is a path, hub id or JSON with `checkpoint` on stdin."""
    if model != "-":
        if not model.strip():
            raise ModelError("MODEL is empty", "give a path, a hub id, an alias or -")
        return model
    if sys.stdin is None or sys.stdin.isatty():
        raise UsageError("MODEL is - but stdin is a terminal", "pipe a stage in, or give a path")
    try:
        line = sys.stdin.readline(_LONGEST_LINE).strip()
        line.encode()
    except UnicodeError:
        raise UsageError("stdin holds no UTF-8 text", "pipe a path or a stage's result") from None
    if not line:
        raise UpstreamError("nothing arrived on stdin", "the stage before failed: see its message")
    return _checkpoint(line) if line.startswith("{") else line


def _checkpoint(line: str) -> str:
    from mambactl.foreign import json_value, reason

    try:
        found = json_value(line)
    except ValueError as error:
        problem = f"stdin starts with {{ but is not one line of JSON ({reason(error)})"
        raise UsageError(problem) from None
    checkpoint = found.get("checkpoint") if isinstance(found, dict) else None
    if not isinstance(checkpoint, str) or not checkpoint:
        raise UsageError("the JSON line on stdin has no `checkpoint`")
    return checkpoint


def read_text(value: str | None) -> str | None:
    """Return a prompt argument, for `-` everything on stdin."""
    if value != "-":
        return value
    if sys.stdin is None or sys.stdin.isatty():
        raise UsageError("the prompt is - but stdin is a terminal", "pipe the text in")
    try:
        return sys.stdin.read()
    except UnicodeError:
        raise UsageError("the prompt on stdin is not UTF-8 text", "convert it first") from None


def stdin_is_pipe() -> bool:
    """True if input may arrive on stdin without a person typing it; /dev/null has none."""
    if sys.stdin is None:
        return False
    try:
        return not stat.S_ISCHR(os.fstat(sys.stdin.fileno()).st_mode)
    except OSError:
        # it is no file at all, but an object of Python
        return not sys.stdin.isatty()


def drawn(block: str | Table) -> str:
    """Return text for stdout; a table is as wide as it needs to be when nobody looks."""
    if isinstance(block, str):
        return printable(block)
    from rich.console import Console

    width = None if sys.stdout.isatty() else 10_000
    console = Console(file=(written := StringIO()), width=width, no_color=True)
    console.print(grid(block.title, block.columns, block.rows, block.numbers))
    lines = [line.rstrip() for line in written.getvalue().splitlines()]
    return "\n".join(line for line in lines if line)
