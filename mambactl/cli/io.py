"""The pipe contract: one line in, one result on stdout, everything else on stderr."""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

from mambactl.console import grid
from mambactl.errors import ModelError, ResourceError, UpstreamError, UsageError
from mambactl.stage_result import Table


@contextmanager
def guarded_stdout() -> Iterator[None]:
    """Point descriptor 1 at stderr, so that no library (Python or C) can write to the pipe."""
    sys.stdout.flush()
    saved = os.dup(1)
    os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(saved, 1)
        os.close(saved)


def write_out(text: str, descriptor: int = 1) -> None:
    """Write text and one newline to stdout; a reader that went away is not an error."""
    data = (text.rstrip("\n") + "\n").encode()
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


def write_json(content: dict[str, Any], descriptor: int = 1) -> None:
    """Write one JSON object on one line to stdout."""
    write_out(json.dumps(content, ensure_ascii=False, default=str), descriptor)


def read_model(model: str) -> str:
    """Return the model argument; `-` is a path, hub id or JSON with `checkpoint` on stdin."""
    if model != "-":
        if not model.strip():
            raise ModelError("MODEL is empty", "give a path, a hub id, an alias or -")
        return model
    if sys.stdin is None or sys.stdin.isatty():
        raise UsageError("MODEL is - but stdin is a terminal", "pipe a stage in, or give a path")
    line = sys.stdin.readline().strip()
    if not line:
        raise UpstreamError("nothing arrived on stdin", "the stage before failed: see its message")
    return _checkpoint(line) if line.startswith("{") else line


def _checkpoint(line: str) -> str:
    try:
        checkpoint = json.loads(line).get("checkpoint")
    except json.JSONDecodeError as error:
        raise UsageError(f"stdin starts with {{ but is not one line of JSON: {error}") from None
    if not isinstance(checkpoint, str) or not checkpoint:
        raise UsageError("the JSON line on stdin has no `checkpoint`")
    return checkpoint


def read_text(value: str | None) -> str | None:
    """Return a prompt argument, for `-` everything on stdin."""
    if value != "-":
        return value
    if sys.stdin is None or sys.stdin.isatty():
        raise UsageError("the prompt is - but stdin is a terminal", "pipe the text in")
    return sys.stdin.read()


def stdin_is_pipe() -> bool:
    """Whether something may arrive on stdin without a person typing it."""
    return sys.stdin is not None and not sys.stdin.isatty()


def default_out(model: str, stage: str, ending: str = "") -> Path:
    """Return `runs/<model-name>-<stage>`, deterministic and relative to the working directory."""
    name = model.rstrip("/").rsplit("/", 1)[-1].partition("@")[0]
    for suffix in (".safetensors", ".st", ".gguf", ".bin"):
        name = name.removesuffix(suffix)
    return Path("runs") / f"{name or 'model'}-{stage}{ending}"


def drawn(block: str | Table) -> str:
    """Return text for stdout; a table is as wide as it needs to be when nobody looks."""
    if isinstance(block, str):
        return block
    from rich.console import Console

    width = None if sys.stdout.isatty() else 10_000
    console = Console(file=StringIO(), width=width, no_color=True)
    console.print(grid(block.title, block.columns, block.rows, block.numbers))
    lines = [line.rstrip() for line in console.file.getvalue().splitlines()]
    return "\n".join(line for line in lines if line)
