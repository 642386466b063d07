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

# widest text that is still read with ease
WIDEST = 110
Topic = Annotated[
    str | None,
    typer.Argument(
        help="document or command to read about; all are listed without one",
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
    from mambactl.cli.topics import contents, read

    text = contents() if topic is None else read(topic)
    if not man:
        return text
    from mambactl.cli.man_page import man_page

    return man_page(topic or "docs", text)


def _rendered(text: str) -> str:
    """Markdown as a terminal of this width shows it, in colours where the pager passes them on."""
    from rich.console import Console
    from rich.markdown import Markdown

    width = min(shutil.get_terminal_size().columns, WIDEST)
    screen = Console(
        file=StringIO(),
        width=width,
        force_terminal=_passes_colours(),
        no_color="NO_COLOR" in os.environ,
        emoji=False,
    )
    screen.print(Markdown(text, hyperlinks=False))
    return screen.file.getvalue()


def _passes_colours() -> bool:
    pager = os.environ.get("MANPAGER") or os.environ.get("PAGER") or "less"
    passes = pager.split()[0].endswith("less") and "r" in os.environ.get("LESS", "").lower()
    return passes and shutil.which("less") is not None
