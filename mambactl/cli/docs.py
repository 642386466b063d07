"""`mambactl docs`: the documents, through a pager on a terminal and as Markdown in a pipe."""

import os
import pydoc
import shutil
import sys
from io import StringIO
from typing import Annotated

import typer

from mambactl import console
from mambactl.cli import suggestions
from mambactl.cli.topics import REFERENCE, files, pages, topics
from mambactl.errors import UsageError
from mambactl.foreign import excerpt
from mambactl.options.fields import nearest

REFERENCE_TITLE = "Every command, recipe, exit code and environment variable"
# widest text that is still read with ease
WIDEST = 110
Topic = Annotated[
    str | None,
    typer.Argument(
        help="document or command to read about; all are listed without one",
        metavar="TOPIC",
        autocompletion=suggestions.documents,
    ),
]
Man = Annotated[bool, typer.Option("--man", help="a page for `man -l -`, in place of Markdown")]


def docs(topic: Topic = None, man: Man = False) -> None:
    """Read the documents: a tutorial, guides, and a reference.

    \b
    Examples:
      mambactl docs
      mambactl docs tutorial
      mambactl docs distill
      mambactl docs reference > reference.md
      mambactl docs tutorial --man | man -l -
    """
    text = document(topic, man)
    if man or not sys.stdout.isatty():
        console.write_out(text)
        return
    os.environ.setdefault("LESS", "-R")
    pydoc.pager(_rendered(text))


def document(topic: str | None = None, man: bool = False) -> str:
    """The text that `docs` shows: Markdown, or a manual page."""
    text = _contents() if topic is None else _read(topic)
    if not man:
        return text
    from mambactl.cli.man_page import man_page

    return man_page(topic or "docs", text)


def _read(topic: str) -> str:
    """A document as Markdown; UsageError with the nearest name for an unknown one."""
    if topic in (written := files()):
        return written[topic].read_text("utf-8")
    if topic not in pages():
        raise UsageError(f"no document {excerpt(topic)!r}", nearest(topic, pages()))
    # builds every command of the program
    from mambactl.cli.command_reference import command_page, reference

    return reference() if topic == REFERENCE else command_page(topic)


def _contents() -> str:
    """The list of all documents, each with its heading."""
    lines = [f"- `{topic}`: {_title(topic)}" for topic in topics()]
    return "\n".join(
        [
            "# Documents of mambactl",
            "",
            "`mambactl docs TOPIC` shows one; the name of a command shows its options.",
            "",
            *lines,
        ]
    )


def _title(topic: str) -> str:
    if topic == REFERENCE:
        return REFERENCE_TITLE
    return _read(topic).partition("\n")[0].removeprefix("# ")


def _rendered(text: str) -> str:
    """Markdown as a terminal of this width shows it, in colours where the pager passes them on."""
    from rich.console import Console
    from rich.markdown import Markdown

    width = min(shutil.get_terminal_size().columns, WIDEST)
    shown = StringIO()
    screen = Console(
        file=shown,
        width=width,
        force_terminal=_passes_colours(),
        no_color="NO_COLOR" in os.environ,
        emoji=False,
    )
    screen.print(Markdown(text, hyperlinks=False))
    return shown.getvalue()


def _passes_colours() -> bool:
    pager = os.environ.get("MANPAGER") or os.environ.get("PAGER") or "less"
    passes = pager.split()[0].endswith("less") and "r" in os.environ.get("LESS", "").lower()
    return passes and shutil.which("less") is not None
