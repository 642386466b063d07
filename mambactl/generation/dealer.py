"""Batches that the processes of a run share in memory: each gets the results of all, in order.

Batches are formed before they are dealt, and what is summed is summed in their order, so that the
number of processes decides no result. Every process goes the same way, as all have the same
numbers. What lands on disk batch by batch is dealt by `mambactl.generation.dealing` alone.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from io import BytesIO
from typing import TypeVar, cast

import torch

from mambactl.generation.dealing import Deal
from mambactl.json_values import JsonObject
from mambactl.ranks import is_main, processes, store

Item = TypeVar("Item")
Result = TypeVar("Result")


def _one(item: object) -> int:
    return 1


def unheard(count: int) -> None:
    """Take no notice of progress."""


class Dealer:
    """Dealer of batches to the processes of a run, or (not `shared`) to this process alone.

    All processes make the same calls in the same order. Results are tensors, texts, numbers, and
    lists, tuples or dictionaries of them; shared tensors arrive on the CPU.
    """

    def __init__(self, shared: bool = False):
        self.shared = shared

    @classmethod
    def of_run(cls) -> "Dealer":
        """The dealer of all processes of this run, once all of them are there."""
        shared = processes() > 1
        if shared:
            # while they are on their way alike: later one may have much to do before the others
            store()
        return cls(shared)

    @property
    def leads(self) -> bool:
        """True if this process alone decides and writes."""
        return not self.shared or is_main()

    def results(
        self,
        batches: Sequence[Item],
        work: Callable[[Item], Result],
        advance: Callable[[int], None] = unheard,
        size: Callable[[Item], int] = _one,
    ) -> list[Result]:
        """`work` of every batch, in their order; `advance` hears the `size` of what is done."""
        if not self.shared:
            found = []
            for batch in batches:
                found.append(work(batch))
                advance(size(batch))
            return found
        deal, sizes = Deal(), [size(batch) for batch in batches]
        digest = hashlib.sha256(repr(sizes).encode()).hexdigest()
        own: dict[int, bytes] = {}
        for number in deal.numbers(deal.left(digest, range(len(batches)))):
            own[number] = _packed(work(batches[number]))
            # before the result, so that whoever has all results has heard of all
            advance(deal.done(sizes[number]))
            deal.put(str(number), own[number])
        bodies = (
            own.pop(number)
            if number in own
            else deal.get(str(number), lambda: advance(deal.done()))
            for number in range(len(batches))
        )
        found = [cast(Result, _unpacked(body)) for body in bodies]
        advance(deal.done())
        return found

    def from_main(self, made: Callable[[], JsonObject]) -> JsonObject:
        """The value that the main process makes, on every process."""
        if not self.shared:
            return made()
        deal = Deal()
        if not is_main():
            return json.loads(deal.get("value"))
        value = made()
        deal.put("value", json.dumps(value).encode())
        return value

    def finish(self) -> None:
        """Let the main process wait until all others came here: it holds what they read."""
        if self.shared:
            deal = Deal()
            deal.leave()
            for _ in deal.others():
                pass


ALONE = Dealer()


def _packed(value: object) -> bytes:
    body = BytesIO()
    torch.save(value, body)
    return body.getvalue()


def _unpacked(body: bytes) -> object:
    # others' values are data: nothing in them is run
    return torch.load(BytesIO(body), map_location="cpu", weights_only=True)
