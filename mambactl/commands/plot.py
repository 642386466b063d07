"""`mambactl plot`: the KL of one or several runs over tokens, as a PNG."""

import os
from collections.abc import Iterable
from pathlib import Path

from mambactl.errors import UsageError
from mambactl.files import LEDGER, NAMED_FILE, explained, replacing
from mambactl.options.reading import PlotConfig
from mambactl.report.plots import draw
from mambactl.stage_result import StageResult


def run(options: PlotConfig) -> StageResult:
    """Draw every run into one picture; its name is the text."""
    path = Path(os.path.expanduser(options.out))
    with explained(path, *NAMED_FILE), replacing(path) as new:
        draw(dict(_labelled(options.runs)), new)
    return StageResult(None, text=str(path))


def _labelled(runs: Iterable[str]) -> Iterable[tuple[str, Path]]:
    """A short name of every run, made longer where two would be the same, and its ledger."""
    names = [Path(os.path.expanduser(run)) for run in runs]
    short = [path.name for path in names]
    for path in names:
        yield (path.name if short.count(path.name) == 1 else str(path)), _ledger(path)


def _ledger(path: Path) -> Path:
    """The ledger of a folder, of a single file (beside it), or the file itself."""
    beside = path.with_name(f"{path.name}.{LEDGER}")
    candidates = [path / LEDGER, beside] if path.suffix != ".jsonl" else [path]
    for candidate in candidates:
        if os.path.isfile(candidate):
            return candidate
    raise UsageError(f"{path} has no {LEDGER}", "give a checkpoint that `mambactl distill` made")
