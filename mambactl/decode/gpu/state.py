"""What a model keeps of a running batch on the device: caches, rings, states and scratch."""

from dataclasses import dataclass

import torch
from torch import Tensor

from mambactl.kernels.decode.reference.slots import positions_held, slot_of
from mambactl.models.cache import HybridCache, RecurrentCache, WindowedCache
from mambactl.models.packed import (
    AttentionWeights,
    Mamba1Weights,
    Mamba2Weights,
    MixerWeights,
    PackedModel,
    attention_of,
)

# slots of a ring come in such pieces: other numbers of drafts then seldom need other kernels
RING_STEP = 16


@dataclass
class AttentionState:
    """Keys and values of every position, or of those that sinks and a window see
    (`kernels.decode.reference.slots` says which slot is whose).
    """

    keys: Tensor  # [B, Hk, S, P]
    values: Tensor  # [B, Hk, S, P]
    splits: int  # programs that share a sequence's slots
    ring: int = 0  # slots behind those of the sinks; 0: every position has its own


@dataclass
class RecurrentState:
    """Tensors that `kernels.decode.reference.recurrent` describes.

    The attention form of Mamba-1 has neither `mixed` nor `low`, Mamba-2 no `low`.
    """

    ring: Tensor  # [B, R, C]
    state: Tensor  # [B, H, N, P] or [B, Ch, N], fp32
    mixed: Tensor | None = None  # [B, R, Ch]
    low: Tensor | None = None  # [B, R, dt_rank + 2 N]
    window: AttentionState | None = None  # of the attention beside a Mamba-2 mixer


@dataclass
class Scratch:
    """Rows of one pass; nothing in it outlives the pass."""

    hidden: Tensor  # [M, D]
    scaled: Tensor  # [M, D]
    squares: Tensor  # flat
    wide: Tensor  # flat, q or z
    mixed: Tensor  # flat, what a mixer hands to its output projection
    inner: Tensor  # flat, MLP or the attention beside a mixer
    partial: Tensor  # flat fp32
    counter: Tensor  # flat int32, zero between launches


@dataclass
class ModelState:
    """Caches of every layer for sequences of up to `capacity` tokens."""

    layers: list[AttentionState | RecurrentState]
    scratch: Scratch
    capacity: int

    def tensors(self) -> list[Tensor]:
        """All that outlives a pass."""
        windows = [layer.window for layer in self.layers if isinstance(layer, RecurrentState)]
        held = [vars(part).values() for part in [*self.layers, *windows] if part is not None]
        return [value for values in held for value in values if isinstance(value, Tensor)]

    def load(self, cache: HybridCache, weights: PackedModel) -> None:
        """Take over what reading the prompts left; rows beyond the cache's stay empty."""
        lengths = cache.lengths
        for state, held, layer in zip(self.layers, cache.layers, weights.layers, strict=True):
            if isinstance(state, AttentionState):
                rows, _, slots, _ = held.keys.shape
                slots = min(slots, self.capacity)
                state.keys[:rows, :, :slots] = held.keys[:, :, :slots]
                state.values[:rows, :, :slots] = held.values[:, :, :slots]
                continue
            _load_recurrent(state, held, lengths, layer.mixer)
            if state.window is not None:
                _load_ring(state.window, held, lengths)


def _load_recurrent(
    state: RecurrentState, held: RecurrentCache, lengths: Tensor, mixer: MixerWeights
) -> None:
    rows = len(lengths)
    live, window = held.live, held.window
    if isinstance(mixer, Mamba2Weights):
        live = live.mT
    else:
        window = window[..., mixer.ring_source().to(window.device)]
    state.state[:rows] = live
    before = window.shape[1]
    at = lengths[:, None] - before + torch.arange(before, device=lengths.device)  # [B, W-1]
    b = torch.arange(rows, device=lengths.device)[:, None]
    state.ring[b, at % state.ring.shape[1], : window.shape[2]] = window


def _load_ring(state: AttentionState, held: WindowedCache, lengths: Tensor) -> None:
    """Sinks and the last positions of the prompts; the two rings may differ in size."""
    sinks, slots = held.span.sinks, state.keys.shape[2]
    place = positions_held(lengths, slots, sinks, state.ring)  # [B, S]
    # what the prompt's ring no longer holds nobody sees
    there = (place >= 0) & ((place < sinks) | (place >= lengths[:, None] - held.room))
    index = slot_of(place.clamp(min=0), sinks, held.room)[:, None, :, None]
    rows = len(lengths)
    for ours, theirs in ((state.keys, held.keys), (state.values, held.values)):
        taken = theirs.gather(2, index.expand(-1, theirs.shape[1], -1, theirs.shape[3]))
        ours[:rows] = taken.masked_fill(~there[:, None, :, None], 0)


def make_state(
    weights: PackedModel, ops, batch: int, capacity: int, slots: int, longest: int, ahead: int
) -> ModelState:
    """Empty state for passes of up to `longest` tokens per sequence.

    `ahead`: how many tokens behind the first one of a step its passes may write.
    """
    splits = 16 if batch <= 4 else max(1, 64 // batch)
    layers: list[AttentionState | RecurrentState] = []
    for layer in weights.layers:
        mixer = layer.mixer
        if isinstance(mixer, AttentionWeights):
            layers.append(_keys(mixer, weights.table, batch, capacity, splits))
            continue
        held = _recurrent(mixer, weights.table, batch, slots)
        if (attention := attention_of(mixer)) is not None:
            held.window = _ring(attention, weights.table, batch, ahead)
        layers.append(held)
    return ModelState(layers, _scratch(weights, ops, batch, longest, splits), capacity)


def _keys(
    m: AttentionWeights, like: Tensor, batch: int, slots: int, splits: int, ring: int = 0
) -> AttentionState:
    shape = (batch, m.kv_heads, slots, m.width)
    return AttentionState(like.new_zeros(shape), like.new_zeros(shape), splits, ring)


def _ring(m: AttentionWeights, like: Tensor, batch: int, ahead: int) -> AttentionState:
    room = -(-(m.window + ahead) // RING_STEP) * RING_STEP
    # few slots: a second program would wait for the first
    return _keys(m, like, batch, m.sinks + room, 1, room)


def _recurrent(
    mixer: Mamba1Weights | Mamba2Weights, like: Tensor, batch: int, slots: int
) -> RecurrentState:
    def ring(width: int) -> Tensor:
        return like.new_zeros(batch, slots, width)

    s = mixer.sizes
    raw, kind = ring(mixer.ring_width), _state_dtype(like)
    if isinstance(mixer, Mamba2Weights):
        state = like.new_zeros(batch, s.n_heads, s.d_state, s.head_dim, dtype=kind)
        return RecurrentState(raw, state, ring(s.conv_dim))
    state = like.new_zeros(batch, s.d_inner, s.d_state, dtype=kind)
    if mixer.low is None:
        return RecurrentState(raw, state)
    return RecurrentState(raw, state, ring(s.d_inner), ring(len(mixer.low)))


def _state_dtype(like: Tensor) -> torch.dtype:
    return torch.float64 if like.dtype == torch.float64 else torch.float32


def _scratch(weights: PackedModel, ops, batch: int, longest: int, splits: int) -> Scratch:
    like, rows = weights.table, batch * longest
    width = like.shape[1]
    mixers = [layer.mixer for layer in weights.layers]
    attentions = [a for a in map(attention_of, mixers) if a is not None]
    inner = max(
        [m.out.weight.shape[1] for m in [*mixers, *attentions]]
        + [0 if layer.down is None else layer.down.shape[1] for layer in weights.layers]
    )
    partial, counter = 0, 0
    for m in attentions:
        need = ops.scratch(rows, batch, m.kv_heads, m.heads // m.kv_heads, m.width, splits)
        partial, counter = max(partial, need[0]), max(counter, need[1])
    counts = [batch * tokens for tokens in range(1, longest + 1)]
    pieces = max(ops.square_pieces(m, width) * m for m in counts)
    flat = torch.float32
    return Scratch(
        hidden=like.new_zeros(rows, width),
        scaled=like.new_zeros(rows, width),
        squares=like.new_zeros(pieces, dtype=_state_dtype(like)),
        wide=like.new_zeros(rows * inner),
        mixed=like.new_zeros(rows * inner),
        inner=like.new_zeros(rows * inner),
        partial=like.new_zeros(max(partial, 1), dtype=flat),
        counter=like.new_zeros(max(counter, 1), dtype=torch.int32),
    )
