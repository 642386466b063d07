"""Weights, state and buffers of a decode pass, and the contract of a mixer that runs in one.

A packed mixer holds its weights as the kernels want them, makes and loads its own state, and runs
itself. Stacking moves weights: the model's own parameters become views of the stacks, so nothing
is held twice and the model still computes what it did.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from mambactl.kernels.byte_matrix import ByteMatrix, Matrix
from mambactl.kernels.decode.operations import DecodeOps
from mambactl.kernels.decode.reference.linear import TAPS
from mambactl.kernels.reference import still
from mambactl.models.cache import LayerCache
from mambactl.models.prompt_ends import PromptEnds
from mambactl.models.session_size import StateSize
from mambactl.present import of_kind, present


@dataclass(frozen=True)
class Rotations:
    """Cosines and sines [S, P / 2] that rotate keys with the position, and states (`of_states`)."""

    cos: Tensor
    sin: Tensor

    @cached_property
    def of_states(self) -> tuple[Tensor, Tensor]:
        """Rotation of recurrent states: one channel pair is left unrotated."""
        return still(self.cos, 1.0), still(self.sin, 0.0)

    @property
    def of_heads(self) -> tuple[Tensor, Tensor]:
        """Rotation of queries and keys."""
        return self.cos, self.sin

    @cached_property
    def none(self) -> tuple[Tensor, Tensor]:
        """Tables of the same size that turn nothing."""
        return torch.ones_like(self.cos), torch.zeros_like(self.sin)


class NotSupported(ValueError):
    """The decode kernels cannot run this model; the message says why."""


@dataclass(frozen=True)
class Projection:
    """y = x W^T + bias."""

    weight: Matrix  # [N, K]
    bias: Tensor | None  # [N]


@dataclass(frozen=True)
class Segment:
    """Tokens of a pass: T per sequence from position start[b] + offset on.

    Recurrent layers start from `base` and store their state at `base_next` (the same: nowhere);
    all four are int32 [B], and sequences whose `active` is 0 are left alone.
    """

    start: Tensor
    active: Tensor
    base: Tensor
    base_next: Tensor
    T: int
    offset: int = 0

    @property
    def rows(self) -> int:
        """M = B * T."""
        return len(self.start) * self.T


@dataclass
class Residual:
    """The residual stream of a pass and its scratch, cut to the pass's rows."""

    hidden: Tensor  # [M, D]
    scaled: Tensor  # [M, D], the stream times the weight of the norm that reads it next
    squares: Tensor  # [M, pieces]
    wide: Tensor  # flat: queries, or the gate of a recurrence
    mixed: Tensor  # flat: inputs of a mixer's output projection
    inner: Tensor  # flat: activations of an MLP, or of the attention beside a mixer


@dataclass(frozen=True)
class PassContext:
    """Everything that the layers of one pass share."""

    ops: DecodeOps
    eps: float
    rotations: Rotations | None  # None where nothing rotates with the position
    partial: Tensor  # flat fp32, scratch of attention
    counter: Tensor  # flat int32, zero between launches


@dataclass
class AttentionState:
    """Keys and values of every position, or of those that sinks and a window see
    (`kernels.decode.reference.slots` says which slot is whose).
    """

    keys: Tensor  # [B, Hk, S, P]
    values: Tensor  # [B, Hk, S, P]
    splits: int  # programs that share a sequence's slots
    ring: int = 0  # slots behind those of the sinks; 0: every position has its own

    def tensors(self) -> list[Tensor]:
        """Every tensor that outlives a pass."""
        return [self.keys, self.values]

    def rows(self, rows: slice, splits: int) -> "AttentionState":
        """The state of some sequences, in the same memory."""
        # the slots of a ring have one program
        own = self.splits if self.ring else splits
        return replace(self, keys=self.keys[rows], values=self.values[rows], splits=own)


@dataclass
class RecurrentState:
    """Tensors that `kernels.decode.reference.recurrent` describes.

    The attention form of Mamba-1 has neither `mixed` nor `low`, Mamba-2 no `low`.
    """

    ring: Tensor  # [B, R, C]
    state: Tensor  # [B, H, N, P] or [B, Ch, N], fp32
    mixed: Tensor | None = None  # [B, R, Ch]
    low: Tensor | None = None  # [B, R, dt_rank + 2 N]
    window: AttentionState | None = None  # of the attention beside the recurrence
    kept: AttentionState | None = None  # of heads that keep full attention

    def tensors(self) -> list[Tensor]:
        """Every tensor that outlives a pass."""
        own = [t for t in (self.ring, self.state, self.mixed, self.low) if t is not None]
        attended = [part for part in (self.window, self.kept) if part is not None]
        return own + [tensor for part in attended for tensor in part.tensors()]

    def rows(self, rows: slice, splits: int) -> "RecurrentState":
        """The state of some sequences, in the same memory."""
        return RecurrentState(
            self.ring[rows],
            self.state[rows],
            None if self.mixed is None else self.mixed[rows],
            None if self.low is None else self.low[rows],
            self.window and self.window.rows(rows, splits),
            self.kept and self.kept.rows(rows, splits),
        )


class LayerState(Protocol):
    """State of one layer for a running batch."""

    def tensors(self) -> list[Tensor]:
        """Every tensor that outlives a pass; a sequence is a row of each."""
        ...

    def rows(self, rows: slice, splits: int) -> "LayerState":
        """The state of some sequences, in the same memory; `splits` as in `StateSize`."""
        ...


State = TypeVar("State", bound=LayerState)
Held = TypeVar("Held", bound=LayerCache, contravariant=True)


class PackedMixer(Protocol[State, Held]):
    """A mixer of a decode pass, with the state and the cache that are its own."""

    @property
    def activations(self) -> int:
        """Columns of the widest buffer that a row needs."""
        ...

    @property
    def attention(self) -> "KeyReader | None":
        """The attention in it, which needs scratch."""
        ...

    def new_state(self, like: Tensor, size: StateSize) -> State:
        """Empty state in the dtype and on the device of `like`."""
        ...

    def lend(self, state: State, cache: Held) -> None:
        """Let a cache write keys and values of all tokens where decoding reads them; those that
        it holds are copied.
        """

    def load(self, state: State, cache: Held, ends: PromptEnds) -> None:
        """Take over the rest of what reading prompts left in a layer's cache."""

    def run(
        self, context: PassContext, state: State, s: Residual, segment: Segment, gain: Tensor
    ) -> None:
        """Add the mixer's output to the stream, scaled next by the norm weight `gain` [D]."""


# layers of one model, each with a state of its own kind
AnyPacked: TypeAlias = PackedMixer[Any, Any]


class PackedRecurrence:
    """Base of packed mixers without keys."""

    out: Projection

    def lend(self, state: "RecurrentState", cache: LayerCache) -> None:
        """Do nothing: there are no keys."""

    @property
    def attention(self) -> None:
        """Always None: there are no keys."""
        return None

    @property
    def activations(self) -> int:
        """Columns of the widest buffer that a row needs."""
        return self.out.weight.shape[1]


class KeyReader(Protocol):
    """Sizes of an attention that a pass runs."""

    @property
    def heads(self) -> int: ...

    @property
    def kv_heads(self) -> int: ...

    @property
    def width(self) -> int: ...


def stack(linears: list[nn.Linear]) -> Projection:
    """One projection of several, which become its views; missing biases are zero."""
    weight = _joined_weights([linear.weight for linear in linears])
    biases = [linear.bias for linear in linears]
    if all(bias is None for bias in biases):
        return Projection(weight, None)
    if any(bias is None for bias in biases):
        like = next(bias for bias in biases if bias is not None)
        parts = [
            like.new_zeros(linear.out_features) if linear.bias is None else linear.bias.data
            for linear in linears
        ]
        return Projection(weight, torch.cat(parts))
    return Projection(weight, _joined([present(bias) for bias in biases]))


def _joined_weights(parts: Sequence[Matrix]) -> Matrix:
    if all(isinstance(part, ByteMatrix) for part in parts):
        values, scale = ([getattr(part, name) for part in parts] for name in ("values", "scale"))
        return ByteMatrix(_joined(values), _joined(scale))
    return _joined([of_kind(Tensor, part) for part in parts])


def _joined(parts: Sequence[Tensor]) -> Tensor:
    first = parts[0].data
    rows = sum(len(part) for part in parts)
    if _adjoin([part.data for part in parts]):
        # stacked by an earlier call
        return first.as_strided((rows, *first.shape[1:]), first.stride())
    whole = torch.cat([part.data for part in parts])
    start = 0
    for part in parts:
        part.data = whole[start : start + len(part)]
        start += len(part)
    return whole


def _adjoin(parts: list[Tensor]) -> bool:
    """True if tensors lie one after the other in the same memory."""
    offset = parts[0].storage_offset()
    for part in parts:
        same = part.untyped_storage().data_ptr() == parts[0].untyped_storage().data_ptr()
        if not same or part.storage_offset() != offset or not part.is_contiguous():
            return False
        offset += part.numel()
    return True


def sum_of_biases(*projections: Projection) -> Tensor | None:
    """The bias of a sum of projections."""
    biases = [projection.bias for projection in projections if projection.bias is not None]
    return sum(biases[1:], start=biases[0]) if biases else None


def packed_conv(conv: nn.Conv1d) -> Projection:
    """A depthwise convolution as weight [Ch, TAPS] and bias [Ch]; NotSupported with more taps."""
    channels, _, taps = conv.weight.shape
    if taps > TAPS:
        raise NotSupported(f"a convolution of {taps} taps (at most {TAPS})")
    weight = conv.weight.new_zeros(channels, TAPS)
    weight[:, TAPS - taps :] = conv.weight[:, 0]
    bias = conv.weight.new_zeros(channels) if conv.bias is None else conv.bias
    return Projection(weight, bias)


def load_ring(state: RecurrentState, live: Tensor, inputs: Tensor, ends: PromptEnds) -> None:
    """Put a live state and the newest inputs of the convolution [B, W-1, Ch] where a pass reads.

    Asks the device for nothing.
    """
    ends.write(state.state, live)
    at = ends.newest(inputs.shape[1], state.ring.shape[1])  # [B, W-1]
    state.ring[ends.rows, at, : inputs.shape[2]] = inputs


def state_dtype(like: Tensor) -> torch.dtype:
    """fp64 for fp64 weights, otherwise fp32."""
    return torch.float64 if like.dtype == torch.float64 else torch.float32
