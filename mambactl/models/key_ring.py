"""Cache of attention beside a Mamba layer: keys and values of a window of tokens with sinks.

The first `sinks` positions have slots of their own and the others share a ring of R slots
(`kernels.decode.reference.slots`), so that memory does not grow with the text. R is the window
and as many tokens as may still be taken back: after a rollback whatever a query can see is in the
ring, and what lies beyond the cursor is masked until it is overwritten.
"""

import torch
from torch import Tensor

from mambactl.kernels.decode.reference.slots import positions_held, slot_of
from mambactl.models.mixers.settings import WindowSettings
from mambactl.present import present


class KeyRing:
    """`keys` and `values` [B, Hk, S + R, P]; nothing in them is changed in place."""

    def __init__(self, settings: WindowSettings) -> None:
        self.span = settings
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def before(self, keys: Tensor, values: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, Hk, S + W - 1 + T, P]: sinks, the window before `start`, the tokens.

        keys, values [B, Hk, T, P] are those of tokens from `start` [B] on. The order is that of
        positions, whatever the size of the ring, so that sums round alike.
        """
        self._begin(keys, values)
        sunk = torch.arange(self.span.sinks, device=start.device).expand(len(start), -1)  # [B, S]
        near = start[:, None] + torch.arange(1 - self.span.window, 0, device=start.device)
        before_keys, before_values = self._read(torch.cat([sunk, near], 1))
        return torch.cat([before_keys, keys], 2), torch.cat([before_values, values], 2)

    def write(
        self, keys: Tensor, values: Tensor, start: Tensor, n_new: Tensor | None, revocable: int
    ) -> None:
        """Keep the first n_new [B] of T tokens from `start` on.

        `revocable`: how many of the newest tokens a rollback may take back, these among them.
        """
        self._begin(keys, values)
        self._grow(start, self.span.window - 1 + revocable)
        end = start + (keys.shape[2] if n_new is None else n_new)
        old_keys, old_values = self.held_keys, present(self.values)
        position = positions_held(end, old_keys.shape[2], self.span.sinks, self.room)  # [B, S + R]
        fresh = position >= start[:, None]
        index = (position - start[:, None]).clamp(0, keys.shape[2] - 1)
        self.keys, self.values = (
            torch.where(fresh[:, None, :, None], _take(new, index), old)
            for old, new in ((old_keys, keys), (old_values, values))
        )

    @property
    def held_keys(self) -> Tensor:
        """Keys of the ring; TypeError before the first ones are written."""
        return present(self.keys)

    @property
    def room(self) -> int:
        """Number of ring slots behind the sinks, R."""
        return self.held_keys.shape[2] - self.span.sinks

    def _begin(self, keys: Tensor, values: Tensor) -> None:
        if self.keys is None:
            slots = self.span.sinks + self.span.window
            # zeros, not empty memory: a masked NaN would still poison the softmax average
            self.keys, self.values = (
                t.new_zeros(*t.shape[:2], slots, t.shape[3]) for t in (keys, values)
            )

    def _grow(self, start: Tensor, room: int) -> None:
        """Make the ring larger before tokens from `start` on are written."""
        if room > self.room:
            sinks = self.span.sinks
            position = positions_held(start, sinks + room, sinks, room)  # [B, S + room]
            self.keys, self.values = self._read(position)

    def _read(self, position: Tensor) -> list[Tensor]:
        """Keys and values [B, Hk, n, P] at positions [B, n]; anything at those below 0."""
        slots = slot_of(position.clamp(min=0), self.span.sinks, self.room)
        return [_take(t, slots) for t in (self.held_keys, present(self.values))]


def with_slots(store: Tensor, slots: int) -> Tensor:
    """The first `slots` slots of store [B, Hk, S, P], zeros where it has fewer."""
    held = store.shape[2]
    if slots <= held:
        return store[:, :, :slots]
    # zeros, not empty memory: a masked NaN would still poison the softmax average
    grown = store.new_zeros(*store.shape[:2], slots, store.shape[3])
    if held:
        grown[:, :, :held] = store
    return grown


def _take(t: Tensor, slots: Tensor) -> Tensor:
    """Slots [B, n] of t [B, Hk, S, P]."""
    return t.gather(2, slots[:, None, :, None].expand(-1, t.shape[1], -1, t.shape[3]))
