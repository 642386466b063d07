"""The command that is running, for what records how a result was made."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

PROGRAM = "mambactl"
_words: ContextVar[tuple[str, ...]] = ContextVar("words", default=())


def words() -> list[str]:
    """The command line of this process, or the one that would do what Python asked for."""
    return [PROGRAM, *(_words.get() or sys.argv[1:])]


@contextmanager
def standing_for(arguments: Sequence[str]) -> Iterator[None]:
    """Record these arguments inside the block, for a process that was not started as mambactl."""
    token = _words.set(tuple(arguments))
    try:
        yield
    finally:
        _words.reset(token)
