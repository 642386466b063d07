"""Messages typed in a terminal, and answers that a key stops."""

import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

from mambactl import console
from mambactl.errors import ResourceError

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession

PROMPT = "> "


def attended() -> bool:
    """True if stdin and stderr are a terminal."""
    return all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stderr))


def editor(commands: Iterable[str]) -> "PromptSession[str]":
    """An editor of lines in the terminal, where Alt-Enter begins another line of a message.

    `commands` are completed at the beginning of a line. Raises ResourceError without the library.
    """
    try:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.completion import WordCompleter
        from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
        from prompt_toolkit.output import create_output
    except ModuleNotFoundError as error:
        hint = "pip install prompt-toolkit, or pipe the messages in"
        raise ResourceError(f"{error.name} is missing", hint) from error
    keys = KeyBindings()

    @keys.add("escape", "enter")
    def add_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    # what libraries write is escaped; what this one draws must not be
    terminal = getattr(sys.stderr, "terminal", sys.stderr)
    return PromptSession(
        key_bindings=keys,
        completer=WordCompleter([f"/{name}" for name in commands], sentence=True),
        output=create_output(stdout=terminal),
        reserve_space_for_menu=4,
    )


def typed_lines(session: "PromptSession[str]") -> Iterator[str]:
    """Lines as they are typed, until Ctrl-D; Ctrl-C drops the line and begins a new one."""
    while True:
        try:
            with console.attended():
                line = session.prompt(PROMPT)
        except KeyboardInterrupt:
            continue
        except EOFError:
            return
        yield line


@contextmanager
def stoppable() -> Iterator[Callable[[], bool]]:
    """Catch the first Ctrl-C in the block; a second one interrupts as usual."""
    asked: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        if asked and callable(before):
            before(number, frame)
        asked.append(number)

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield lambda: bool(asked)
    finally:
        signal.signal(signal.SIGINT, before)
