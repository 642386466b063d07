"""The Mamba-2 mixer in a decode pass."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from mambactl.kernels.decode.operations import AttentionArguments
from mambactl.models.cache import RecurrentCache
from mambactl.models.mixers.settings import Mamba2Settings
from mambactl.models.packed import (
    PackedRecurrence,
    PassContext,
    Projection,
    RecurrentState,
    Residual,
    Segment,
    load_ring,
    state_dtype,
)
from mambactl.models.prompt_ends import PromptEnds
from mambactl.models.session_size import StateSize
from mambactl.present import of_kind, present


@dataclass(frozen=True)
class PackedMamba2(PackedRecurrence):
    """Mamba-2 of a decode pass; the ring takes the columns of `inner` from `ring_lo` on.

    `rotation` (cos, sin) [S, N / 2] rotates B and C.
    """

    inner: Projection
    conv: Projection  # weight [Ch, 4]
    A: Tensor  # [H]
    D: Tensor  # [H]
    dt_bias: Tensor  # [H]
    gain: Tensor  # [H P]
    out: Projection
    sizes: Mamba2Settings
    rotation: tuple[Tensor, Tensor] | None = None

    @property
    def norm_by_head(self) -> bool:
        """True if the gated norm stays within heads, so that the scan can do it."""
        return self.sizes.norm_groups == self.sizes.n_heads

    def new_state(self, like: Tensor, size: StateSize) -> RecurrentState:
        """Empty rings and state."""
        s = self.sizes
        raw, mixed = (like.new_zeros(size.batch, size.slots, width) for width in s.ring_widths)
        shape = (size.batch, s.n_heads, s.d_state, s.head_dim)
        state = like.new_zeros(shape, dtype=state_dtype(like))
        return RecurrentState(raw, state, mixed)

    def load(self, state: RecurrentState, cache: RecurrentCache, ends: PromptEnds) -> None:
        """Take over the state and the newest inputs of the convolution."""
        load_ring(state, present(cache.live).mT, present(cache.inputs), ends)

    def run(
        self,
        context: PassContext,
        state: RecurrentState,
        s: Residual,
        segment: Segment,
        gain: Tensor,
    ) -> None:
        """Add the mixer's output to the stream."""
        rows, out = segment.rows, self.out
        z, mixed = (flat[: rows * self.activations].view(rows, -1) for flat in (s.wide, s.mixed))
        self.mix(context, state, s, segment, z, mixed, self.inner)
        context.ops.add_residual(mixed, out.weight, out.bias, s.hidden, gain, s.scaled, s.squares)

    def mix(
        self,
        context: PassContext,
        state: RecurrentState,
        s: Residual,
        segment: Segment,
        z: Tensor,
        mixed: Tensor,
        inner: Projection,
        beside: Sequence[AttentionArguments] = (),
        rotation: tuple[Tensor, Tensor] | None = None,
        settle: Callable[[], None] | None = None,
    ) -> None:
        """Input of the output projection into `mixed`, by the gate `z`, both [M, H P].

        Rows of `inner` behind the recurrence's are those of the attentions `beside`, which write
        their own outputs; `rotation` turns their heads, and `settle` does what is left to do then.
        """
        ops, at, sizes = context.ops, segment, self.sizes
        convolved = present(state.mixed)
        where = {"T": at.T, "offset": at.offset, "beside": beside}
        ops.project(
            s.scaled, s.squares, context.eps, inner.weight, inner.bias, z, state.ring,
            at.start, count=at.active, scale=at.T, ring_lo=sizes.d_inner,
            conv=(of_kind(Tensor, self.conv.weight), present(self.conv.bias), convolved),
            rotation=rotation, **where,
        )  # fmt: skip
        if settle is not None:
            settle()
        if self.rotation is not None:
            ops.rotate(
                convolved, *self.rotation, at.start, at.active, at.T, T=at.T, offset=at.offset,
                groups=sizes.b_groups + sizes.c_groups,
            )  # fmt: skip
        ops.mamba2(
            state.ring, convolved, z, state.state, self.A, self.D, self.dt_bias,
            self.gain if self.norm_by_head else None, eps=sizes.norm_eps, out=mixed, start=at.start,
            count=at.active, base=at.base, base_next=at.base_next, scale=at.T,
            x_heads=sizes.x_heads, b_groups=sizes.b_groups, c_groups=sizes.c_groups, **where,
        )  # fmt: skip
        if not self.norm_by_head:
            ops.grouped_norm(mixed, self.gain, sizes.norm_eps, sizes.norm_groups)
