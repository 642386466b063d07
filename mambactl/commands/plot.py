"""`mambactl plot`: the KL of one or several runs over tokens, as a PNG."""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from mambactl.cli import io
from mambactl.errors import UsageError
from mambactl.files import LEDGER, NAMED_FILE, explained, replacing

Runs = Annotated[
    list[str], typer.Argument(metavar="RUN", help="distilled checkpoint, its .partial, or .jsonl")
]
Out = Annotated[str, typer.Option("--out", "-o", metavar="FILE", help="picture to write (PNG)")]


def plot(runs: Runs, out: Out = "metrics.png") -> None:
    """Draw the KL to the teacher over the tokens trained on, one curve per run.

    \b
    Examples:
      mambactl plot runs/smollm2-135m-distill
      mambactl plot a.st b.st runs/c.partial -o compare.png
    """
    with io.guarded_stdout():
        from mambactl.report.plots import draw

        path = Path(out).expanduser()
        with explained(path, *NAMED_FILE), replacing(path) as new:
            draw(dict(_labelled(runs)), new)
    io.write_out(str(path))


def _labelled(runs: Iterable[str]) -> Iterable[tuple[str, Path]]:
    """A short name of every run, made longer where two would be the same, and its ledger."""
    names = [Path(run).expanduser() for run in runs]
    short = [path.name for path in names]
    for path in names:
        yield (path.name if short.count(path.name) == 1 else str(path)), _ledger(path)


def _ledger(path: Path) -> Path:
    """The ledger of a folder, of a single file (beside it), or the file itself."""
    beside = path.with_name(f"{path.name}.{LEDGER}")
    candidates = [path / LEDGER, beside] if path.suffix != ".jsonl" else [path]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise UsageError(f"{path} has no {LEDGER}", "give a checkpoint that `mambactl distill` made")
