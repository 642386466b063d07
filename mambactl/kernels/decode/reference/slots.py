"""Slot of a position in a cache of keys and values."""

import torch
from torch import Tensor


def slot_of(position: Tensor, sinks: int, ring: int) -> Tensor:
    """The slot of each position: its own number, or with `ring` > 0 one that positions share.

    Then the first `sinks` positions have slots of their own, and the others share the `ring`
    slots behind those, one after the other.
    """
    if ring == 0:
        return position
    return torch.where(position < sinks, position, sinks + position % ring)


def positions_held(end: Tensor, slots: int, sinks: int, ring: int) -> Tensor:
    """The position [B, slots] that each slot holds once those before `end` [B] are written.

    -1 where it holds none.
    """
    slot = torch.arange(slots, device=end.device).expand(len(end), -1)
    last = end[:, None] - 1
    held = slot
    if ring > 0:
        latest = last - (last - (slot - sinks)) % ring
        held = torch.where(slot < sinks, slot, torch.where(latest < sinks, -1, latest))
    return torch.where(held <= last, held, -1)
