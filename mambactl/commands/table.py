"""`mambactl table`: measured speeds as Markdown, on stdout or inside a document."""

import os
from pathlib import Path

from mambactl.checkpoint.card import between
from mambactl.errors import UsageError
from mambactl.files import NAMED_FILE, explained, replacing
from mambactl.foreign import read_text
from mambactl.options.reading import BEGIN, END, TableConfig
from mambactl.report.bench_table import markdown
from mambactl.report.kept_results import read_content
from mambactl.stage_result import StageResult


def run(options: TableConfig) -> StageResult:
    """Write the table into a document, whose name is then the text, or make it the text."""
    paths = [Path(os.path.expanduser(name)) for name in options.files]
    text = markdown(list(zip(options.files, map(read_content, paths), strict=True)))
    if options.into is None:
        return StageResult(None, text=text)
    _replace(Path(os.path.expanduser(options.into)), text)
    return StageResult(None, text=options.into)


def _replace(path: Path, text: str) -> None:
    document = read_text(path, UsageError, hint="check the path")
    replaced = between(document, BEGIN, END, text)
    if replaced is None:
        raise UsageError(f"{path} has no place for the table", f"put {BEGIN} and {END} in it")
    with explained(path, *NAMED_FILE), replacing(path) as new:
        new.write_text(replaced, encoding="utf-8")
