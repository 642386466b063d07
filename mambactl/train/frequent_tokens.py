"""The tokens that a draft head can draft: those that its target writes most often."""

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain

import torch
from torch import Tensor

from mambactl import console
from mambactl.checkpoint.run_folder import RunFolder
from mambactl.data.encoding import Example
from mambactl.data.pack import Batch, Row
from mambactl.errors import OutputError
from mambactl.files import replacing
from mambactl.foreign import read_object
from mambactl.train.ledger import Written
from mambactl.train.student_rows import StudentRows

# steps whose text is counted before the first one, and tokens of the data behind it
COUNTED_STEPS, COUNTED_TOKENS = 16, 1 << 22
KEPT, AGAIN = "tokens.json", "start again with --force"


class CountedRows:
    """Feed of text that the target writes, whose first batches were made before the run."""

    def __init__(self, rows: StudentRows):
        self.rows = rows
        self.first: list[Batch] = []

    def write(self, batches: int) -> list[Batch]:
        """Write the first batches, which `open` then gives out."""
        with self.rows.open(0) as source, console.progress("write", batches) as task:
            for _ in range(batches):
                self.first.append(next(source))
                task.advance(1)
        return self.first

    @contextmanager
    def open(self, done: int) -> Iterator[Iterator[Batch]]:
        """Batches from number `done` on; see `Feed`."""
        with self.rows.open(max(done, len(self.first))) as source:
            yield chain(self.first[done:], source)

    def take_counts(self) -> Written:
        """Return the counts of the oldest step that is not logged yet; see `Feed`."""
        return self.rows.take_counts()


def frequent(counts: Sequence[Tensor], size: int) -> Tensor:
    """The `size` ids with the largest counts, in ascending order.

    Of ids with equal counts [V] those count that come next, and last the lower id: vocabularies are
    numbered as their words were found, frequent ones first.
    """
    order = torch.arange(len(counts[0]))
    for each in reversed(counts):
        order = order[each[order].argsort(descending=True, stable=True)]
    return order[:size].sort().values


def counted(learned: Iterable[tuple[Tensor, Tensor]], size: int) -> Tensor:
    """Occurrences [V] of ids below `size` where a mask of the same shape is set."""
    total = torch.zeros(size, dtype=torch.long)
    for ids, mask in learned:
        total += torch.bincount(ids[mask].long().flatten(), minlength=size)
    return total


def of_batches(batches: Sequence[Batch]) -> Iterator[tuple[Tensor, Tensor]]:
    """Ids and masks of batches."""
    return ((batch.input_ids, batch.loss_mask) for batch in batches)


def of_rows(rows: Sequence[Row]) -> Iterator[tuple[Tensor, Tensor]]:
    """Ids and masks of rows."""
    return ((torch.from_numpy(row.input_ids), torch.from_numpy(row.loss_mask)) for row in rows)


def of_examples(examples: Sequence[Example]) -> Iterator[tuple[Tensor, Tensor]]:
    """Ids of examples with masks that leave nothing out."""
    ids = (torch.from_numpy(example.input_ids) for example in examples)
    return ((each, torch.ones_like(each, dtype=torch.bool)) for each in ids)


def keep(folder: RunFolder, ids: Tensor) -> None:
    """Keep the choice in the working folder, for a run that goes on."""
    with replacing(folder.path / KEPT) as new:
        new.write_text(json.dumps({"ids": ids.tolist()}), "utf-8")


def kept(folder: RunFolder, size: int) -> Tensor | None:
    """Choice that an earlier process kept; OutputError where it is damaged."""
    path = folder.path / KEPT
    if not path.exists():
        return None
    found = read_object(path, OutputError, AGAIN).get("ids")
    whole = isinstance(found, list) and all(type(i) is int and 0 <= i < size for i in found)
    if not found or not whole:
        raise OutputError(f"{path} holds no tokens of the target", AGAIN)
    return torch.tensor(found)
