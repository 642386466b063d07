"""Real rows of a pass and their positions, worked out once for all layers."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from mambactl.kernels.decode.reference.linear import TAPS
from mambactl.kernels.decode.reference.slots import positions_held, slot_of
from mambactl.present import present


@dataclass(frozen=True)
class Group:
    """Sequences whose recurrences take equally many steps: `size` of them, `fresh` new ones.

    After `keep` of the steps the state is stored. `rows` are the new tokens' rows in the pass.
    """

    sequences: Tensor  # [n]
    positions: Tensor  # [n, size]
    rows: Tensor  # [n, fresh]
    size: int
    fresh: int
    keep: int


@dataclass(frozen=True)
class Rows:
    """Rows of a segment of T tokens per sequence, from position start[b] + offset on."""

    start: list[int]
    count: list[int]
    T: int
    offset: int
    found: dict[tuple[int, ...], Tensor] = field(default_factory=dict)
    # where all of them would be there, or seen, there is none
    masks: dict[tuple[int, ...], Tensor | None] = field(default_factory=dict)
    groups: dict[tuple[int, ...], list[Group]] = field(default_factory=dict)

    @cached_property
    def _real(self) -> list[tuple[int, int]]:
        """Sequence and position of each real row."""
        return [
            (b, start + self.offset + t)
            for b, (start, count) in enumerate(zip(self.start, self.count, strict=True))
            for t in range(self.T if count else 0)
            if start + self.offset + t >= 0
        ]

    @cached_property
    def sequence(self) -> Tensor:
        """The sequence of each real row [R]."""
        return torch.tensor([b for b, _ in self._real], dtype=torch.long)

    @cached_property
    def position(self) -> Tensor:
        """The position of each real row [R]."""
        return torch.tensor([at for _, at in self._real], dtype=torch.long)

    @cached_property
    def index(self) -> Tensor | None:
        """The number in the pass of each real row [R]; None where all are real."""
        if len(self._real) == len(self.start) * self.T:
            return None
        numbers = [b * self.T + at - self.offset - self.start[b] for b, at in self._real]
        return torch.tensor(numbers, dtype=torch.long)

    def angles(self, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Rotations of all rows, of both halves of a head: cos and (-sin, sin), [M, 1, P]."""
        key = (2, cos.data_ptr())
        if key not in self.found:
            at = [max(s + self.offset + t, 0) for s in self.start for t in range(self.T)]
            c, s = cos[at], sin[at]  # [M, P / 2]
            self.found[key] = torch.cat([c, c], 1)[:, None]
            self.found[3, cos.data_ptr()] = torch.cat([-s, s], 1)[:, None]
        return self.found[key], self.found[3, cos.data_ptr()]

    @cached_property
    def single(self) -> int | None:
        """The position of a pass over one token of one sequence, None of any other pass."""
        alone = len(self.start) == self.T == 1 and self.count[0] == 1
        return self.start[0] + self.offset if alone and self.start[0] + self.offset >= 0 else None

    def slot(self, sinks: int, ring: int) -> int:
        """Slot of the keys of that token."""
        at = present(self.single)
        return at if ring == 0 or at < sinks else sinks + at % ring

    def real(self, values: Tensor) -> Tensor:
        """Real rows [R, ...] of values [M, ...]."""
        return values if self.index is None else values[self.index]

    def slots(self, sinks: int, ring: int) -> Tensor:
        """Slots [R] of the keys of real rows."""
        key = (0, sinks, ring)
        if key not in self.found:
            self.found[key] = slot_of(self.position, sinks, ring)
        return self.found[key]

    def taps(self, slots: int) -> tuple[Tensor, Tensor | None]:
        """Ring slots [R, 4] of what a convolution sees at each real row; which are there (None:
        all of them).
        """
        key = (1, slots)
        if key not in self.found:
            at = self.position[:, None] + torch.arange(1 - TAPS, 1)  # [R, 4]
            there = at >= 0
            self.found[key] = at % slots
            self.masks[4, slots] = None if bool(there.all()) else there[..., None]
        return self.found[key], self.masks[4, slots]

    def longest(self) -> int:
        """Positions up to the last one of the pass."""
        return max(start + self.offset + self.T for start in self.start)

    def hidden(self, slots: int, window: int, sinks: int, ring: int) -> Tensor | None:
        """Additive mask [B, 1, T, 1, slots]: -inf for keys that a row does not see."""
        key = (5, slots, window, sinks, ring)
        if key not in self.masks:
            self.masks[key] = self._hidden(slots, window, sinks, ring)
        return self.masks[key]

    def _hidden(self, slots: int, window: int, sinks: int, ring: int) -> Tensor | None:
        start = torch.tensor(self.start)
        position = (start + self.offset)[:, None, None] + torch.arange(self.T)[:, None]  # [B, T, 1]
        held = positions_held(start + self.offset + self.T, slots, sinks, ring)[:, None]
        seen = (held >= 0) & (held <= position)  # [B, T, S]
        if window > 0:
            seen = seen & ((held > position - window) | (held < sinks))
        # rows before the text and rows of sequences that wait see anything: nobody reads them
        seen = seen | ~seen.any(-1, keepdim=True)
        if bool(seen.all()):
            return None
        mask = torch.zeros(seen.shape).masked_fill(~seen, float("-inf"))
        return mask[:, None, :, None]

    def recurrences(self, base: Sequence[int], base_next: Sequence[int]) -> list[Group]:
        """Sequences by the steps that their recurrences take from `base` on."""
        key = (*base, *base_next)
        if key not in self.groups:
            self.groups[key] = self._recurrences(base, base_next)
        return self.groups[key]

    def _recurrences(self, base: Sequence[int], base_next: Sequence[int]) -> list[Group]:
        alike: dict[tuple[int, int, int], list[int]] = {}
        for b, (start, count) in enumerate(zip(self.start, self.count, strict=True)):
            end = start + self.offset + self.T
            size = end - base[b]
            if count and size > 0:
                fresh = min(self.T, size)
                alike.setdefault((size, fresh, base_next[b] - base[b]), []).append(b)
        return [
            Group(
                torch.tensor(members),
                torch.tensor([base[b] for b in members])[:, None] + torch.arange(size),
                torch.tensor([b * self.T + self.T - fresh for b in members])[:, None]
                + torch.arange(fresh),
                size,
                fresh,
                keep,
            )  # fmt: skip
            for (size, fresh, keep), members in alike.items()
        ]
