"""Documents packed into rows of one length, and a batch order that resumes by step number.

Every document of a row has its own `seq_idx` (0, 1, ...), and padding at the end counts as one
more document: numbers stay non-negative and non-decreasing, which every kernel accepts, and a
model that resets where `seq_idx` changes cannot leak. A loss counts `loss_mask` (never padding or
a document's first token, which nothing in the row predicts); an alignment counts `valid`.
"""

import queue
import threading
from bisect import bisect_left, insort
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
import torch

from mambactl import console
from mambactl.data.encoding import Example
from mambactl.errors import UsageError

# rows shorter than this share too little context to be worth a trimmed shape of their own
TRIM = 64


class Row(NamedTuple):
    """One training row, all arrays [T]: ids int32, positions int32, masks bool."""

    input_ids: np.ndarray
    seq_idx: np.ndarray
    position_ids: np.ndarray
    loss_mask: np.ndarray
    valid: np.ndarray


class Batch(NamedTuple):
    """Rows as tensors [B, T]: ids and positions int64, seq_idx int32, masks bool.

    `seq_idx` is None where every row is one document (and padding behind it, which nothing before
    it can see), so that kernels may take their plain causal route.
    """

    input_ids: torch.Tensor
    seq_idx: torch.Tensor | None
    position_ids: torch.Tensor
    loss_mask: torch.Tensor
    valid: torch.Tensor

    def to(self, device: torch.device | str) -> "Batch":
        """Copy to a device."""
        return self.each(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> "Batch":
        """Copy in memory that a GPU may read while the host goes on."""
        return self.each(torch.Tensor.pin_memory)

    def each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        """Apply `change` to every tensor."""
        return Batch(
            change(self.input_ids),
            None if self.seq_idx is None else change(self.seq_idx),
            change(self.position_ids),
            change(self.loss_mask),
            change(self.valid),
        )


@console.doing("packing rows")
def pack(examples: Sequence[Example], max_length: int, packing: bool = True) -> list[Row]:
    """Fill rows of `max_length` tokens, deterministically.

    With `packing`, longer documents are cut into pieces (each starts afresh) and pieces fill rows
    best-fit decreasing, so that a document is never cut to fill a gap. Without, each example is
    one row, truncated. Documents of one token are dropped. Raises UsageError when nothing is left.
    """
    examples = [example for example in examples if len(example.input_ids) > 1]
    if packing:
        pieces = [piece for example in examples for piece in _pieces(example, max_length)]
        rows = [_row(members, max_length) for members in _best_fit(pieces, max_length)]
    else:
        rows = [_row([_slice(example, 0, max_length)], max_length) for example in examples]
    rows = [row for row in rows if row.loss_mask.any()]
    if not rows:
        raise UsageError("the data holds no token to learn from", "give longer documents")
    return rows


@dataclass(frozen=True)
class _Member:
    """A document and its number among those that are packed."""

    input_ids: np.ndarray
    loss_mask: np.ndarray
    number: int


class _Piece(Protocol):
    """A document, or a part of one."""

    @property
    def input_ids(self) -> np.ndarray: ...

    @property
    def loss_mask(self) -> np.ndarray: ...


P = TypeVar("P", bound=_Piece)


def pack_whole(
    examples: Sequence[Example], max_length: int, packing: bool = True
) -> tuple[list[Row], list[list[int]]]:
    """Rows that hold every example uncut, and which of them each row holds, in their order there.

    Without `packing` each is a row of its own, long ones first. No example may be longer than
    `max_length`.
    """
    members = [_Member(*example, index) for index, example in enumerate(examples)]
    if packing:
        groups = _best_fit(members, max_length)
    else:
        groups = [[one] for one in sorted(members, key=lambda one: -len(one.input_ids))]
    rows = [_row(group, max_length) for group in groups]
    return rows, [[member.number for member in group] for group in groups]


def batches(
    rows: Sequence[Row],
    batch_size: int,
    seed: int,
    start: int = 0,
    trim: bool = True,
    share: tuple[int, int] = (0, 1),
) -> Iterator[Batch]:
    """Endless batches from batch number `start` on; every epoch is a new order given by `seed`.

    Batch n is always the same whatever `start` was. Of `share` (i, n) it is the i-th of n batches
    that together are one of n times the size. With `trim`, columns that are padding in every
    row are cut off in steps of `TRIM`; without, all batches have one shape, as compiled code needs.
    """
    for members in drawn_rows(rows, batch_size, seed, start, share):
        yield collate(members, trim)


def drawn_rows(
    rows: Sequence[Row], batch_size: int, seed: int, start: int, share: tuple[int, int]
) -> Iterator[list[Row]]:
    """Rows of the batches that `batches` yields."""
    epoch, order = -1, np.empty(0, np.int64)
    number, count = share
    position = (start * count + number) * batch_size
    while True:
        members = []
        for index in range(position, position + batch_size):
            if index // len(rows) != epoch:
                epoch = index // len(rows)
                order = np.random.default_rng([seed, epoch]).permutation(len(rows))
            members.append(rows[order[index % len(rows)]])
        position += count * batch_size
        yield members


def collate(rows: Sequence[Row], trim: bool = True) -> Batch:
    """Stack rows of one length, less the columns that are padding in all of them."""
    length = len(rows[0].input_ids)
    if trim:
        longest = max(int(row.valid.sum()) for row in rows)
        length = min(length, -(-longest // TRIM) * TRIM)
    stacked = Row(
        *(np.stack([array[:length] for array in column]) for column in zip(*rows, strict=True))
    )
    packed = bool((stacked.seq_idx[stacked.valid] > 0).any())
    return Batch(
        torch.from_numpy(stacked.input_ids).long(),
        torch.from_numpy(stacked.seq_idx) if packed else None,
        torch.from_numpy(stacked.position_ids).long(),
        torch.from_numpy(stacked.loss_mask),
        torch.from_numpy(stacked.valid),
    )


def blank_row(max_length: int) -> Row:
    """A row of padding, of which nothing is learned."""
    return _row([], max_length)


def _slice(example: Example, start: int, end: int) -> Example:
    return Example(example.input_ids[start:end], example.loss_mask[start:end])


def _pieces(example: Example, max_length: int) -> Iterator[Example]:
    for start in range(0, len(example.input_ids), max_length):
        piece = _slice(example, start, start + max_length)
        if len(piece.input_ids) > 1:
            yield piece


def _best_fit(pieces: Sequence[P], max_length: int) -> list[list[P]]:
    rows: list[list[P]] = []
    # (tokens left, row number) of every row that is not full, ascending
    gaps: list[tuple[int, int]] = []
    for piece in sorted(pieces, key=lambda piece: -len(piece.input_ids)):
        size = len(piece.input_ids)
        found = bisect_left(gaps, (size, -1))
        if found < len(gaps):
            left, number = gaps.pop(found)
        else:
            left, number = max_length, len(rows)
            rows.append([])
        rows[number].append(piece)
        # a document needs two tokens
        if left - size > 1:
            insort(gaps, (left - size, number))
    return rows


def _row(members: Sequence[_Piece], max_length: int) -> Row:
    row = Row(
        np.zeros(max_length, np.int32),
        np.full(max_length, len(members), np.int32),
        np.zeros(max_length, np.int32),
        np.zeros(max_length, bool),
        np.zeros(max_length, bool),
    )
    start = 0
    for number, example in enumerate(members):
        end = start + len(example.input_ids)
        row.input_ids[start:end] = example.input_ids
        row.seq_idx[start:end] = number
        row.position_ids[start:end] = np.arange(end - start)
        row.loss_mask[start + 1 : end] = example.loss_mask[1:]
        row.valid[start:end] = True
        start = end
    row.position_ids[start:] = np.arange(max_length - start)
    return row


DEPTH = 2
# how often the thread looks whether anybody still wants its batches
POLL_SECONDS = 0.1


@contextmanager
def ahead(source: Iterator[Batch], pin: bool) -> Iterator[Iterator[Batch]]:
    """Yield the batches of `source` in order, the next `DEPTH` of them ready.

    With `pin` they lie in page-locked memory, from which a copy to the GPU does not wait. What
    `source` raises is raised where the batch is asked for.
    """
    ready: queue.Queue[Batch | BaseException] = queue.Queue(DEPTH)
    unwanted = threading.Event()

    def offer(item: Batch | BaseException) -> None:
        while not unwanted.is_set():
            try:
                return ready.put(item, timeout=POLL_SECONDS)
            except queue.Full:
                continue

    def work() -> None:
        try:
            for batch in source:
                offer(batch.pinned() if pin else batch)
                if unwanted.is_set():
                    return
        except BaseException as error:
            offer(error)

    thread = threading.Thread(target=work, name="batches", daemon=True)
    thread.start()
    try:
        yield _taken(ready)
    finally:
        unwanted.set()
        thread.join()


def _taken(ready: "queue.Queue[Batch | BaseException]") -> Iterator[Batch]:
    while True:
        item = ready.get()
        if isinstance(item, BaseException):
            raise item
        yield item
