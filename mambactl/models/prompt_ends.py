"""Slots of rings that prompts of given lengths have written last, found once for all layers."""

from typing import NamedTuple

import torch
from torch import Tensor

from mambactl.kernels.decode.reference.slots import positions_held, slot_of


class HeldSlots(NamedTuple):
    """Slots of another ring that hold the positions of a ring's slots, and which are empty."""

    source: Tensor  # [B, 1, S, 1]
    empty: Tensor  # [B, 1, S, 1]


class PromptEnds:
    """Ends of prompts of `lengths` [B] tokens, and the rows of a state that they go `into` [B].

    Without `into` these are the first rows.

    Layers ask the same: what one asked for is kept for the others, as finding it launches dozens of
    small operations. Asks the device for nothing.
    """

    def __init__(self, lengths: Tensor, into: Tensor | None = None):
        self.lengths, self.into = lengths, into
        rows = torch.arange(len(lengths), device=lengths.device) if into is None else into
        self.rows = rows[:, None]  # [B, 1]
        self._newest: dict[tuple[int, int], Tensor] = {}
        self._held: dict[tuple[int, int, int, int], HeldSlots] = {}

    def write(self, state: Tensor, values: Tensor) -> None:
        """Put `values` [B, ...] into the prompts' rows of a tensor of a state."""
        if self.into is None:
            state[: len(values)] = values
        else:
            state.index_copy_(0, self.into, values.to(state.dtype))

    def newest(self, count: int, slots: int) -> Tensor:
        """Slots [B, count] of the last `count` tokens in a ring of `slots`."""
        if (found := self._newest.get((count, slots))) is None:
            steps = torch.arange(count, device=self.lengths.device)
            found = (self.lengths[:, None] - count + steps) % slots
            self._newest[count, slots] = found
        return found

    def held(self, slots: int, sinks: int, ring: int, room: int) -> HeldSlots:
        """Places in a ring of `room` of what `slots` hold, `ring` of them behind `sinks`."""
        key = slots, sinks, ring, room
        if (found := self._held.get(key)) is None:
            position = positions_held(self.lengths, slots, sinks, ring)  # [B, S]
            # what the prompt's ring no longer holds nobody sees
            lost = (position >= sinks) & (position < self.lengths[:, None] - room)
            source = slot_of(position.clamp(min=0), sinks, room)
            empty = (position < 0) | lost
            found = HeldSlots(source[:, None, :, None], empty[:, None, :, None])
            self._held[key] = found
        return found
