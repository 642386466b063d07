"""Rows that can be learned, though perhaps not as they are meant: each reason is said once."""

from typing import NamedTuple

from mambactl import console


class Doubt(NamedTuple):
    """A reason to look at a row: its kind, which is counted, and what it is in this row."""

    kind: str
    detail: str = ""


class Doubts:
    """Doubts found so far: the first row of every kind with its detail, and counts."""

    def __init__(self) -> None:
        self.first: dict[str, tuple[str, str]] = {}
        self.counts: dict[str, int] = {}

    def add(self, doubt: Doubt, where: str) -> None:
        """Note a doubt about one row."""
        self.first.setdefault(doubt.kind, (where, doubt.detail))
        self.counts[doubt.kind] = self.counts.get(doubt.kind, 0) + 1

    def tell(self) -> None:
        """Warn of every kind, with its number of rows and the first of them."""
        for kind, (where, detail) in self.first.items():
            count = self.counts[kind]
            rows = "1 row" if count == 1 else f"{count:,} rows"
            console.warn(f"{kind} ({rows}, the first is {where}{': ' if detail else ''}{detail})")
