"""The result that every command hands to the command line and to Python."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Table:
    """Rows for stdout, drawn as wide as whoever reads them allows."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[object]]
    # all columns but the first align right
    numbers: bool = False


@dataclass(frozen=True)
class StageResult:
    """Result of a command for the command line.

    `path` is the checkpoint for the next stage (None where there is none), `metrics` is JSON-able,
    `text` replaces the path on stdout for commands that print text, `kept` is the file that holds
    the measurement, if one was written. `blocks` are texts and tables in place of `text`. What is
    `written` is on stdout already, piece by piece.
    """

    path: str | None
    metrics: dict[str, object] = field(default_factory=dict)
    text: str | None = None
    kept: Path | None = None
    blocks: tuple[str | Table, ...] = ()
    written: bool = False
