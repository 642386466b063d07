"""The results of `eval` in the card of a checkpoint folder."""

import os
from pathlib import Path

from mambactl.checkpoint.card import with_results
from mambactl.checkpoint.source import CARD, LINEAGE
from mambactl.report.entries import read_entries
from mambactl.report.markdown import markdown


def update_card(folder: Path) -> None:
    """Write every kept result of `eval` into README.md, between marks that a later run replaces.

    A folder that mambactl did not write keeps its card as it is.
    """
    card = folder / CARD
    if not card.is_file() or not (folder / LINEAGE).is_file():
        return
    files = sorted((folder / "results").glob("eval-*.json"))
    entries = [entry for file in files for entry in read_entries(file)]
    text = with_results(card.read_text("utf-8"), markdown(entries, folder))
    partial = card.with_name(f"{CARD}.partial")
    partial.write_text(text, "utf-8")
    os.replace(partial, card)
