"""Sizes of a Mamba-2 mixer, and the mixer in a decode pass."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from mambactl.kernels.decode.operations import AttentionArguments
from mambactl.models.cache import RecurrentCache
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
from mambactl.models.session_size import StateSize


@dataclass(frozen=True)
class Mamba2Settings:
    """Sizes of a Mamba-2 mixer.

    Rows of in_proj are [z (H P), x (x_heads P), B (b_groups N), C (c_groups N), dt (H)]; x heads
    and B groups are repeated consecutively to H heads after the convolution, which is how
    grouped-query attention maps on it (arXiv 2408.15237). The native form has x_heads = H.
    With `rotary` B and C rotate with the position, by the angles of the model's attention, which
    have as many channels as a state (N = P).
    """

    n_heads: int
    head_dim: int
    d_state: int
    x_heads: int
    b_groups: int
    c_groups: int
    norm_groups: int
    norm_eps: float = 1e-5
    d_conv: int = 4
    conv_bias: bool = True
    proj_bias: bool = False
    chunk_size: int = 64
    rotary: bool = False

    @property
    def d_inner(self) -> int:
        """Width of the mixer's output before out_proj."""
        return self.n_heads * self.head_dim

    def with_heads_of(self, other: "Mamba2Settings") -> "Mamba2Settings":
        """The same form with the heads of another mixer."""
        names = ("n_heads", "x_heads", "b_groups", "c_groups", "norm_groups")
        return replace(self, **{name: getattr(other, name) for name in names})

    @property
    def conv_dim(self) -> int:
        """Channels under the convolution: x, B and C."""
        return self.x_heads * self.head_dim + (self.b_groups + self.c_groups) * self.d_state

    @property
    def ring_widths(self) -> tuple[int, int]:
        """Numbers of one token in a decode pass: projections, and x, B, C after the convolution."""
        return self.conv_dim + self.n_heads, self.conv_dim

    @property
    def in_rows(self) -> tuple[int, int, int, int, int]:
        """Rows of z, x, B, C and dt in in_proj."""
        x, b, c = (
            self.x_heads * self.head_dim,
            self.b_groups * self.d_state,
            self.c_groups * self.d_state,
        )
        return self.d_inner, x, b, c, self.n_heads


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
        """Whether the gated norm stays within heads, so that the scan can do it."""
        return self.sizes.norm_groups == self.sizes.n_heads

    def new_state(self, like: Tensor, size: StateSize) -> RecurrentState:
        """Empty rings and state."""
        s = self.sizes
        raw, mixed = (like.new_zeros(size.batch, size.slots, width) for width in s.ring_widths)
        shape = (size.batch, s.n_heads, s.d_state, s.head_dim)
        state = like.new_zeros(shape, dtype=state_dtype(like))
        return RecurrentState(raw, state, mixed)

    def load(self, state: RecurrentState, cache: RecurrentCache, lengths: Tensor) -> None:
        """Take over the state and the newest inputs of the convolution."""
        load_ring(state, cache.live.mT, cache.inputs, lengths)

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
    ) -> None:
        """Input of the output projection into `mixed`, by the gate `z`, both [M, H P].

        Rows of `inner` behind the recurrence's are those of the attentions `beside`, which write
        their own outputs.
        """
        ops, at, sizes = context.ops, segment, self.sizes
        where = {"T": at.T, "offset": at.offset, "beside": beside}
        rotations = context.rotations
        ops.project(
            s.scaled, s.squares, context.eps, inner.weight, inner.bias, z, state.ring,
            at.start, at.active, at.T, ring_lo=sizes.d_inner,
            conv=(self.conv.weight, self.conv.bias, state.mixed),
            rotation=(rotations.cos, rotations.sin) if beside else None, **where,
        )  # fmt: skip
        if self.rotation is not None:
            ops.rotate(
                state.mixed, *self.rotation, at.start, at.active, at.T, T=at.T, offset=at.offset,
                groups=sizes.b_groups + sizes.c_groups,
            )  # fmt: skip
        ops.mamba2(
            state.ring, state.mixed, z, state.state, self.A, self.D, self.dt_bias,
            self.gain if self.norm_by_head else None, sizes.norm_eps, mixed, at.start, at.active,
            at.base, at.base_next, at.T, x_heads=sizes.x_heads, b_groups=sizes.b_groups,
            c_groups=sizes.c_groups, **where,
        )  # fmt: skip
        if not self.norm_by_head:
            ops.grouped_norm(mixed, self.gain, sizes.norm_eps, sizes.norm_groups)
