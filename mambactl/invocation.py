"""The command that is running, for what records how a result was made or starts another one."""

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

PROGRAM = "mambactl"
_words: ContextVar[tuple[str, ...]] = ContextVar("words", default=())


def words() -> list[str]:
    """The command line of this process, or the one that would do what Python asked for."""
    return [PROGRAM, *(_words.get() or sys.argv[1:])]


@contextmanager
def standing_for(arguments: Sequence[str]) -> Iterator[None]:
    """Record these arguments meanwhile: the process itself was not started as mambactl."""
    token = _words.set(tuple(arguments))
    try:
        yield
    finally:
        _words.reset(token)


def child_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment for a child that runs Python, and `extra`.

    Modules are never taken from the current folder, by the child or by what it starts: a yaml.py
    that lies among downloaded data must not run. PYTHONPATH and installed packages stay.
    """
    return {**os.environ, **(extra or {}), "PYTHONSAFEPATH": "1"}
