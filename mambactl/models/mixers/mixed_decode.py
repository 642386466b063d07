"""A layer of kept heads and of heads with a window beside Mamba-2, in a decode pass."""

from dataclasses import dataclass

from torch import Tensor

from mambactl.models.cache import MixedCache
from mambactl.models.mixers.attention import PackedAttention
from mambactl.models.mixers.windowed import PackedWindowed
from mambactl.models.packed import AttentionState, RecurrentState
from mambactl.models.prompt_ends import PromptEnds
from mambactl.models.session_size import StateSize
from mambactl.present import present


@dataclass(frozen=True)
class PackedMixed(PackedWindowed):
    """The parts of a mixed layer in a decode pass."""

    kept: PackedAttention

    @property
    def attentions(self) -> tuple[PackedAttention, ...]:
        """Attentions beside the recurrence: the one that reads the most keys starts first."""
        return self.kept, self.window

    def states(self, state: RecurrentState) -> tuple[AttentionState, ...]:
        """Cached keys and values of each attention."""
        return present(state.kept), present(state.window)

    def new_state(self, like: Tensor, size: StateSize) -> RecurrentState:
        """Empty keys and values of kept heads, rings and state of the others."""
        state = super().new_state(like, size)
        state.kept = self.kept.new_state(like, size)
        return state

    def lend(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, state: RecurrentState, cache: MixedCache
    ) -> None:
        """Let a cache write the keys and values of kept heads here, behind those that it holds."""
        self.kept.lend(present(state.kept), cache.kept)

    def load(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, state: RecurrentState, cache: MixedCache, ends: PromptEnds
    ) -> None:
        """Take over everything else that reading the prompts left."""
        super().load(state, cache, ends)
        self.kept.load(present(state.kept), cache.kept, ends)
