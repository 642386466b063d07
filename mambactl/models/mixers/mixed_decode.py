"""A layer of kept heads and of heads with a window beside Mamba-2, in a decode pass."""

from dataclasses import dataclass

from torch import Tensor

from mambactl.models.cache import MixedCache
from mambactl.models.mixers.attention import PackedAttention
from mambactl.models.mixers.windowed import PackedWindowed
from mambactl.models.packed import (
    PassContext,
    RecurrentState,
    Residual,
    Segment,
    StateSize,
)


@dataclass(frozen=True)
class PackedMixed(PackedWindowed):
    """The parts of a mixed layer in a decode pass."""

    kept: PackedAttention

    @property
    def attention(self) -> PackedAttention:
        """The attention that needs the most scratch."""
        return max(self.window, self.kept, key=lambda part: part.kv_heads)

    @property
    def activations(self) -> int:
        """Columns of the widest buffer that a row needs."""
        attended = self.window.activations + self.kept.activations
        return max(self.recurrence.activations, attended)

    def new_state(self, like: Tensor, size: StateSize) -> RecurrentState:
        """Empty keys and values of kept heads, rings and state of the others."""
        state = super().new_state(like, size)
        state.kept = self.kept.new_state(like, size)
        return state

    def load(
        self, state: RecurrentState, cache: MixedCache, lengths: Tensor, capacity: int
    ) -> None:
        """Take over everything that reading the prompts left."""
        super().load(state, cache, lengths, capacity)
        self.kept.load(state.kept, cache.kept, lengths, capacity)

    def run(
        self,
        context: PassContext,
        state: RecurrentState,
        s: Residual,
        segment: Segment,
        gain: Tensor,
    ) -> None:
        """Add the outputs of all parts, which read the same stream, to it."""
        mixed = self.recurrence.mix(context, state, s, segment)
        widths = [segment.rows * part.activations for part in (self.window, self.kept)]
        near, kept = (part.view(segment.rows, -1) for part in s.inner[: sum(widths)].split(widths))
        self.window.attend(context, state.window, s, segment, near)
        self.kept.attend(context, state.kept, s, segment, kept)
        self.window.add(context, s, near, gain)
        self.kept.add(context, s, kept, gain)
        self.recurrence.add(context, s, mixed, gain)
