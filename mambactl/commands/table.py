"""`mambactl table`: measured speeds as Markdown, on stdout or inside a document."""

import json
from pathlib import Path
from typing import Any

from mambactl.checkpoint.card import between
from mambactl.errors import UsageError
from mambactl.files import NAMED_FILE, explained, replacing
from mambactl.options.reading import BEGIN, END, TableConfig
from mambactl.report.bench_table import markdown
from mambactl.stage_result import StageResult


def run(options: TableConfig) -> StageResult:
    """Write the table into a document, whose name is then the text, or make it the text."""
    text = markdown([(name, _content(name)) for name in options.files])
    if options.into is None:
        return StageResult(None, text=text)
    _replace(Path(options.into).expanduser(), text)
    return StageResult(None, text=options.into)


def _text(name: str) -> str:
    try:
        return Path(name).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise UsageError(f"cannot read {name}: {reason}", "check the path") from None


def _content(name: str) -> dict[str, Any]:
    try:
        content = json.loads(_text(name))
    except json.JSONDecodeError as error:
        hint = "mambactl bench ... --json > FILE"
        raise UsageError(f"{name} is not JSON: {error}", hint) from None
    return content if isinstance(content, dict) else {}


def _replace(path: Path, text: str) -> None:
    replaced = between(_text(str(path)), BEGIN, END, text)
    if replaced is None:
        raise UsageError(f"{path} has no place for the table", f"put {BEGIN} and {END} in it")
    with explained(path, *NAMED_FILE), replacing(path) as new:
        new.write_text(replaced, encoding="utf-8")
