"""The open batch of the engine of whole steps: launches them and reads what arrived.

On a GPU tokens are read while later steps run, so a row that has ended may be written to for a few
more steps, unheard.
"""

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch

from mambactl.decode.gpu.open_session import OpenSession, Sent
from mambactl.decode.gpu.step import DEPTH
from mambactl.decode.open_batch import Likely, RowRequest, Written
from mambactl.decode.prompt_reading import ReadPrompt, ReadRows
from mambactl.kernels.decode.reference.verdict import Finish
from mambactl.present import present

# steps in flight before the host waits for the oldest one's tokens
LAG = 3
POLL_SECONDS = 50e-6
FINISHES: dict[int, str] = {Finish.EOS: "eos", Finish.LENGTH: "length"}


@dataclass(eq=False)
class _Row:
    """A row and how many tokens of it have been read."""

    name: int
    request: RowRequest
    written: int = 0
    left: bool = False

    @cached_property
    def sampled(self) -> bool:
        """True if a step has to compute logits for the row."""
        return self.request.likely or not self.request.params.greedy


@dataclass
class _Flight:
    """A step under way, and the rows that it writes to: None where it leaves one alone."""

    sent: Sent
    rows: list[_Row | None]


@dataclass
class FusedBatch:
    """Rows of an `OpenSession`; see `OpenBatch`."""

    session: OpenSession
    rows: list[_Row] = field(default_factory=list)
    waiting: deque[_Flight] = field(default_factory=deque)
    found: list[Written] = field(default_factory=list)

    @property
    def room(self) -> int:
        """Number of rows that may still join."""
        return self.session.size.batch - len(self.rows)

    @property
    def running(self) -> int:
        """Number of rows under way."""
        return len(self.rows)

    def join(self, row: int, request: RowRequest, prompt: ReadPrompt) -> None:
        """Add a row, whose first token comes with one of the next steps."""
        self.join_all([(row, request)], ReadRows.of(prompt))

    @torch.no_grad()
    def join_all(self, rows: Sequence[tuple[int, RowRequest]], read: ReadRows) -> None:
        """Add a row for each of the prompts that were read together."""
        self._make_room()
        new, first = [_Row(row, request) for row, request in rows], len(self.rows)
        requests = [row.request for row in new]
        self.session.put(first, read, requests)
        self.rows.extend(new)
        sampled, likely = any(row.sampled for row in new), any(each.likely for each in requests)
        sent = self.session.begin(first, read.hidden, sampled, likely)
        self.waiting.append(_Flight(sent, [None] * first + new))

    def leave(self, row: int) -> None:
        """Drop a row before the next step; one that is not under way is ignored."""
        self._remove([each for each in self.rows if each.name == row])

    @torch.no_grad()
    def step(self) -> list[Written]:
        """Launch a step where a row needs one, and return the tokens that have arrived."""
        more = self._more_needed()
        if more:
            self._make_room()
            sampled = any(row.sampled for row in self.rows)
            likely = any(row.request.likely for row in self.rows)
            sent = self.session.launch(len(self.rows), sampled, likely)
            self.waiting.append(_Flight(sent, list(self.rows)))
        most = LAG if more and not self.session.on_host else 0
        while self.waiting and (len(self.waiting) > most or _arrived(self.waiting[0])):
            self._read(self.waiting.popleft())
        found, self.found = self.found, []
        return found

    def _make_room(self) -> None:
        """Read the results that later steps would soon overwrite."""
        while len(self.waiting) >= DEPTH - 1:
            self._read(self.waiting.popleft())

    def _more_needed(self) -> bool:
        """True if the steps under way, a token each at least, may leave a row unfinished."""
        under_way = len(self.waiting)
        return any(row.written + under_way < row.request.params.max_new_tokens for row in self.rows)

    def _read(self, flight: _Flight) -> None:
        while not _arrived(flight):
            time.sleep(POLL_SECONDS)
        letters, ended = self.session.letters(flight.sent), list[_Row]()
        for index, (row, letter) in enumerate(zip(flight.rows, letters, strict=False)):
            # tells the columns of a `Letter` apart at once: every token of every row comes by here
            accepted, drafted, emitted, end, *tokens = letter
            if row is None or row.left or end == Finish.IDLE:
                continue
            row.written += emitted
            likely: list[Likely] | None = None
            if row.request.likely:
                likely = present(flight.sent.likely).row(index, emitted)
            finish = FINISHES.get(end)
            new = tokens[:emitted]
            self.found.append(Written(row.name, new, likely, finish, drafted, accepted))
            if finish is not None:
                ended.append(row)
        self._remove(ended)

    def _remove(self, rows: Sequence[_Row]) -> None:
        """Switch rows off and let the last others take their indices."""
        for row in rows:
            row.left = True
        # from the last on, so that no row moves that leaves too: a move copies all of its state
        for index in sorted(map(self.rows.index, rows), reverse=True):
            last = len(self.rows) - 1
            self.session.stop(index)
            if index < last:
                self.session.move(last, index)
                self.session.stop(last)
                self.rows[index] = self.rows[last]
            self.rows.pop()


def _arrived(flight: _Flight) -> bool:
    return flight.sent.event is None or flight.sent.event.query()
