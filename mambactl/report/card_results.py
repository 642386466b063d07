"""The results of `eval` in the card of a checkpoint folder: a table per kind of measurement."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mambactl.checkpoint.card import with_results
from mambactl.files import CARD, LINEAGE, RESULTS, replacing
from mambactl.metrics import markdown_row, span
from mambactl.report.collect import named_apart
from mambactl.report.entries import WEIGHTS, Entry, Found, read_entries
from mambactl.report.summary import Column, Row, summarise


def update_card(folder: Path) -> None:
    """Write every kept result of `eval` into README.md, between marks that a later run replaces.

    A folder that mambactl did not write keeps its card as it is.
    """
    card = folder / CARD
    if not card.is_file() or not (folder / LINEAGE).is_file():
        return
    files = sorted((folder / RESULTS).glob("eval-*.json"))
    # rounded for a measurement, a model is not the one in the folder
    entries = [
        entry for file in files for entry in read_entries(file) if WEIGHTS not in entry.metrics
    ]
    text = with_results(card.read_text("utf-8"), markdown(entries, folder))
    with replacing(card) as new:
        new.write_text(text, "utf-8")


OWN_NAME = "this model"


def markdown(entries: Sequence[Entry], folder: Path) -> str:
    """A table per kind of measurement, and below them the files (seen from `folder`) they are from.

    All entries are about the checkpoint in `folder`.
    """
    named = named_apart(Found(list(entries), [])).entries
    found = summarise(replace(entry, model=OWN_NAME) for entry in named)
    lines = ["## Results", ""]
    for group in dict.fromkeys(column.group for column in found.columns):
        columns = [column for column in found.columns if column.group == group]
        rows = [row for row in found.rows if any(column in row.cells for column in columns)]
        lines += [_line([group, *(column.heading for column in columns)])]
        lines += ["|---|" + "--:|" * len(columns)]
        lines += [_line([row.name, *(_cell(row, column) for column in columns)]) for row in rows]
        lines += [""]
    lines += [_origin(entry, folder) for entry in entries]
    return "\n".join(lines).rstrip()


def _cell(row: Row, column: Column) -> str:
    held = row.cells.get(column)
    if held is None:
        return ""
    text = column.write(held.value)
    if held.interval is None:
        return text
    return f"{text} ({span(held.interval, column.write)})"


def _origin(entry: Entry, folder: Path) -> str:
    file = Path(entry.source.file)
    name = file.relative_to(folder) if file.is_relative_to(folder) else file
    about = dict(entry.source.details)
    where = ", ".join(about[key] for key in ("device", "date") if key in about)
    return f"- `{name}`: `{entry.source.command}`" + (f" on {where}" if where else "")


def _line(cells: Sequence[str]) -> str:
    return markdown_row(cell.replace("|", r"\|") for cell in cells)
