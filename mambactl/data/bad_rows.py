"""Rows that nothing good can be learned from: named, then refused or left out."""

from collections import Counter
from typing import NamedTuple

from mambactl import console
from mambactl.errors import UsageError

# rows that are named one by one; the rest is counted
NAMED = 10
MALFORMED, REFUSED, DOUBLED = "malformed", "refused by the template", "doubled begin token"
EMPTY, UNANSWERED, LONG = "empty answer", "no answer", "too long"
SAME, UNFIT = "equal answers", "unfit"
LOST, BEYOND = "lost by the template", "token without embedding"
# rows that another command reads
OTHER = "of another kind"


class Bad(NamedTuple):
    """One row: its kind of fault, where it lies, a sentence about it, and what to do."""

    kind: str
    where: str
    problem: str
    cure: str


class BadRows:
    """Bad rows found so far; `settle` refuses the run, or with `skip` says what it left out."""

    def __init__(self, skip: bool = False):
        self.skip = skip
        self.found: list[Bad] = []

    def add(self, kind: str, where: str, problem: str, cure: str = "correct the data") -> None:
        """Note one row."""
        self.found.append(Bad(kind, where, problem, cure))

    def count(self, *kinds: str) -> int:
        """Rows of these kinds."""
        return sum(bad.kind in kinds for bad in self.found)

    @property
    def counts(self) -> dict[str, int]:
        """Rows of every kind, the most frequent first."""
        return dict(Counter(bad.kind for bad in self.found).most_common())

    def report(self) -> str:
        """Name the first rows on stderr; how many there are of each kind, in words."""
        for bad in self.found[:NAMED]:
            console.log(f"{bad.where}: {bad.problem}")
        if len(self.found) > NAMED:
            console.log(f"and {len(self.found) - NAMED} more")
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.counts.items())
        return f"{len(self.found)} bad row{'s' if len(self.found) > 1 else ''} ({kinds})"

    def settle(self) -> None:
        """Warn of rows that are skipped; raises UsageError where they are not to be."""
        if not self.found:
            return
        if self.skip:
            console.warn(f"{self.report()} left out")
            return
        cure = self.found[0].cure
        if self.count(OTHER) < len(self.found):
            # else all rows are for another command
            cure += ", or go on without such rows: --skip-bad-rows"
        raise UsageError(self._named(), cure)

    def require_others(self, option: str, left: int) -> None:
        """Raise UsageError where `option` names data of bad rows alone, `left` is 0."""
        if self.found and not left:
            cure = self.found[0].cure
            raise UsageError(f"no row of {option} can be measured: {self._named()}", cure)

    def _named(self) -> str:
        """The first row and its problem, behind the number of rows where there are more."""
        first = self.found[0]
        message = f"{first.where}: {first.problem}"
        return message if len(self.found) == 1 else f"{self.report()}, the first in {message}"
