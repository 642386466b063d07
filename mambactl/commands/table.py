"""`mambactl table`: measured speeds as Markdown, on stdout or inside a document."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from mambactl.cli import io
from mambactl.errors import UsageError
from mambactl.files import NAMED_FILE, explained, replacing

BEGIN, END = "<!-- bench -->", "<!-- /bench -->"

Files = Annotated[list[str], typer.Argument(metavar="FILE", help="JSON of bench, or of recipe run")]
Into = Annotated[
    str | None,
    typer.Option("--into", metavar="FILE", help=f"replace what is between {BEGIN} and {END}"),
]


def table(files: Files, into: Into = None) -> None:
    """Make a Markdown table from what `bench --json` printed.

    \b
    Examples:
      mambactl bench --synthetic mamba-2.8b --json > b.json && mambactl table b.json
      mambactl table recipes/results/decode-h200.json --into README.md
    """
    from mambactl.report.bench_table import markdown

    text = markdown([(name, _content(name)) for name in files])
    if into is None:
        io.write_out(text)
        return
    _replace(Path(into).expanduser(), text)
    io.write_out(into)


def _text(name: str) -> str:
    try:
        return Path(name).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise UsageError(f"cannot read {name}: {reason}") from None


def _content(name: str) -> dict[str, Any]:
    try:
        content = json.loads(_text(name))
    except json.JSONDecodeError as error:
        hint = "mambactl bench ... --json > FILE"
        raise UsageError(f"{name} is not JSON: {error}", hint) from None
    return content if isinstance(content, dict) else {}


def _replace(path: Path, text: str) -> None:
    from mambactl.checkpoint.card import between

    replaced = between(_text(str(path)), BEGIN, END, text)
    if replaced is None:
        raise UsageError(f"{path} has no place for the table", f"put {BEGIN} and {END} in it")
    with explained(path, *NAMED_FILE), replacing(path) as new:
        new.write_text(replaced, encoding="utf-8")
