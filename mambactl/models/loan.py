"""Memory of a CUDA graph, lent until the graph runs again."""

from dataclasses import dataclass
from typing import Protocol


class Replayed(Protocol):
    """Protocol of a graph that counts its runs."""

    runs: int


@dataclass(frozen=True)
class Loan:
    """Memory with the results of a graph's run, which its next run overwrites."""

    graph: Replayed
    run: int

    def check(self) -> None:
        """Raise RuntimeError where the graph has run again."""
        if self.graph.runs != self.run:
            raise RuntimeError("what a graph has read was overwritten by its next run")
