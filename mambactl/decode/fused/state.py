"""What a model keeps of a running batch on the device: caches, rings, states and scratch."""

from dataclasses import dataclass

import torch
from torch import Tensor

from mambactl.models.cache import HybridCache, RecurrentCache
from mambactl.models.packed import (
    AttentionWeights,
    Mamba2Weights,
    MixerWeights,
    PackedModel,
)


@dataclass
class AttentionState:
    """Keys and values at the slot of their position."""

    keys: Tensor  # [B, Hk, S, P]
    values: Tensor  # [B, Hk, S, P]


@dataclass
class RecurrentState:
    """See `kernels.window.recurrent`; the attention form of Mamba-1 has neither `mixed` nor `low`,
    Mamba-2 no `low`.
    """

    ring: Tensor  # [B, R, C]
    state: Tensor  # [B, H, N, P] or [B, Ch, N], fp32
    mixed: Tensor | None = None  # [B, R, Ch]
    low: Tensor | None = None  # [B, R, dt_rank + 2 N]


@dataclass
class Scratch:
    """Rows of one pass; nothing in it outlives the pass."""

    hidden: Tensor  # [M, D]
    scaled: Tensor  # [M, D]
    squares: Tensor  # flat
    wide: Tensor  # flat, q or z
    mixed: Tensor  # flat, what a mixer hands to its output projection
    inner: Tensor  # flat, MLP
    partial: Tensor  # flat fp32
    counter: Tensor  # flat int32, zero between launches


@dataclass
class ModelState:
    """Caches of every layer for sequences of up to `capacity` tokens."""

    layers: list[AttentionState | RecurrentState]
    scratch: Scratch
    capacity: int
    splits: int

    def load(self, cache: HybridCache, weights: PackedModel) -> None:
        """Take over what reading the prompts left; rows beyond the cache's stay empty."""
        lengths = cache.lengths
        for state, held, layer in zip(self.layers, cache.layers, weights.layers, strict=True):
            if isinstance(state, AttentionState):
                rows, _, slots, _ = held.keys.shape
                slots = min(slots, self.capacity)
                state.keys[:rows, :, :slots] = held.keys[:, :, :slots]
                state.values[:rows, :, :slots] = held.values[:, :, :slots]
            else:
                _load_recurrent(state, held, lengths, layer.mixer)


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


def make_state(
    weights: PackedModel, ops, batch: int, capacity: int, slots: int, longest: int
) -> ModelState:
    """Empty state for passes of up to `longest` tokens per sequence."""
    splits = 16 if batch <= 4 else max(1, 64 // batch)
    layers = [
        _layer_state(layer.mixer, weights, batch, capacity, slots) for layer in weights.layers
    ]
    scratch = _scratch(weights, ops, batch, longest, splits)
    return ModelState(layers, scratch, capacity, splits)


def _layer_state(
    mixer: MixerWeights, weights: PackedModel, batch: int, capacity: int, slots: int
) -> AttentionState | RecurrentState:
    like = weights.table
    if isinstance(mixer, AttentionWeights):
        shape = (batch, mixer.kv_heads, capacity, mixer.width)
        return AttentionState(like.new_zeros(shape), like.new_zeros(shape))

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
    inner = max(
        [m.out.weight.shape[1] for m in mixers]
        + [0 if layer.down is None else layer.down.shape[1] for layer in weights.layers]
    )
    partial, counter = 0, 0
    for m in mixers:
        need = (0, 0)
        if isinstance(m, AttentionWeights):
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
