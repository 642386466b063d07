"""One pass of a packed model over a window of tokens, as a fixed sequence of operations."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mambactl.decode.gpu.state import AttentionState, ModelState, RecurrentState
from mambactl.models.packed import (
    AttentionWeights,
    LayerWeights,
    Mamba1Weights,
    Mamba2Weights,
    PackedModel,
)


@dataclass(frozen=True)
class Window:
    """Where a pass stands: T tokens per sequence from position start[b] + offset on.

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
class Stream:
    """The residual stream of a pass and its scratch, cut to the pass's rows."""

    hidden: Tensor
    scaled: Tensor
    squares: Tensor
    wide: Tensor
    mixed: Tensor
    inner: Tensor


class Pass:
    """Runs windows through one model with one set of operations."""

    def __init__(self, weights: PackedModel, state: ModelState, ops: Any):
        self.weights, self.state, self.ops = weights, state, ops

    def run(self, tokens: Tensor, window: Window) -> Stream:
        """tokens int32 [B, T] -> the stream after the last layer, scaled by the final norm."""
        w, rows = self.weights, window.rows
        s = self._stream(rows)
        self.ops.embed(tokens, w.table, w.layers[0].gain, s.hidden, s.scaled, s.squares)
        gains = [layer.gain for layer in w.layers[1:]] + [w.gain]
        for layer, held, gain in zip(w.layers, self.state.layers, gains, strict=True):
            self._layer(layer, held, gain, s, window)
        return s

    def _stream(self, rows: int) -> Stream:
        held = self.state.scratch
        pieces = self.ops.square_pieces(rows, held.hidden.shape[1])
        return Stream(
            held.hidden[:rows],
            held.scaled[:rows],
            held.squares[: rows * pieces].view(rows, pieces),
            held.wide,
            held.mixed,
            held.inner,
        )

    def _layer(
        self,
        layer: LayerWeights,
        held: AttentionState | RecurrentState,
        gain: Tensor,
        s: Stream,
        window: Window,
    ) -> None:
        mixer, rows = layer.mixer, window.rows
        run = {
            AttentionWeights: self._attention,
            Mamba2Weights: self._mamba2,
            Mamba1Weights: self._mamba1,
        }[type(mixer)]
        mixed = s.mixed[: rows * mixer.out.weight.shape[1]].view(rows, -1)
        run(mixer, held, s, mixed, window)
        after = gain if layer.down is None else layer.mlp_gain
        stream = (s.hidden, after, s.scaled, s.squares)
        near = mixer.window if isinstance(mixer, Mamba2Weights) else None
        if near is not None:
            # it reads the stream as the mixer did, before either is added
            beside = s.inner[: rows * near.out.weight.shape[1]].view(rows, -1)
            self._attention(near, held.window, s, beside, window)
            self.ops.add_residual(beside, near.out.weight, near.out.bias, *stream)
        self.ops.add_residual(mixed, mixer.out.weight, mixer.out.bias, *stream)
        if layer.down is None:
            return
        act = s.inner[: rows * layer.down.shape[1]].view(rows, -1)
        self.ops.swiglu(s.scaled, s.squares, self.weights.eps, layer.gate_up, act)
        self.ops.add_residual(act, layer.down, None, s.hidden, gain, s.scaled, s.squares)

    def _attention(
        self, m: AttentionWeights, held: AttentionState, s: Stream, mixed: Tensor, window: Window
    ) -> None:
        w, rows = self.weights, window.rows
        q = s.wide[: rows * m.heads * m.width].view(rows, -1)
        where = {"T": window.T, "offset": window.offset, "sinks": m.sinks, "ring": held.ring}
        self.ops.project_qkv(
            s.scaled, s.squares, w.eps, m.qkv.weight, m.qkv.bias, w.cos, w.sin, q, held.keys,
            held.values, window.start, window.active, window.T, **where,
        )  # fmt: skip
        scratch = self.state.scratch
        self.ops.attention(
            q, held.keys, held.values, window.start, window.active, window.T, mixed,
            scratch.partial, scratch.counter, splits=held.splits, window=m.window, **where,
        )  # fmt: skip

    def _project(
        self, m: Mamba1Weights | Mamba2Weights, held: RecurrentState, s: Stream, window: Window
    ) -> Tensor:
        """Raw and convolved projections into the rings; returns the gate z [M, d_inner]."""
        z = s.wide[: window.rows * m.sizes.d_inner].view(window.rows, -1)
        conv = None if held.mixed is None else (m.conv.weight, m.conv.bias, held.mixed)
        self.ops.project(
            s.scaled, s.squares, self.weights.eps, m.inner.weight, m.inner.bias, z, held.ring,
            window.start, window.active, window.T, T=window.T, offset=window.offset,
            ring_lo=m.ring_lo, conv=conv,
        )  # fmt: skip
        return z

    def _mamba2(
        self, m: Mamba2Weights, held: RecurrentState, s: Stream, mixed: Tensor, window: Window
    ) -> None:
        z = self._project(m, held, s, window)
        if m.turn is not None:
            self.ops.turn(
                held.mixed, *m.turn, window.start, window.active, window.T, T=window.T,
                offset=window.offset, groups=m.sizes.b_groups + m.sizes.c_groups,
            )  # fmt: skip
        self.ops.mamba2(
            held.ring, held.mixed, z, held.state, m.A, m.D, m.dt_bias,
            m.gain if m.norm_by_head else None, m.sizes.norm_eps, mixed, window.start,
            window.active, window.base, window.base_next, window.T, T=window.T,
            offset=window.offset, x_heads=m.sizes.x_heads, b_groups=m.sizes.b_groups,
            c_groups=m.sizes.c_groups,
        )  # fmt: skip
        if not m.norm_by_head:
            self.ops.grouped_norm(mixed, m.gain, m.sizes.norm_eps, m.sizes.norm_groups)

    def _mamba1(
        self, m: Mamba1Weights, held: RecurrentState, s: Stream, mixed: Tensor, window: Window
    ) -> None:
        z = self._project(m, held, s, window)
        where = {"T": window.T, "offset": window.offset}
        if m.low is not None:
            self.ops.mamba1_low(
                held.mixed, m.low, held.low, window.start, window.active, window.T, **where
            )
        self.ops.mamba1(
            held.ring, held.mixed, held.low, z, held.state, m.conv.weight, m.conv.bias,
            m.dt.weight, m.dt.bias, m.A, m.D, mixed, window.start, window.active, window.base,
            window.base_next, window.T, piece=m.piece, repeat=m.repeat, **where,
        )  # fmt: skip

    def best(self, s: Stream, T: int, last: bool, tokens: Tensor, scratch: "HeadScratch") -> None:
        """The argmax of every row, or only of each sequence's last one, into tokens."""
        scaled, squares = self._rows(s, T, last)
        rows = len(scaled)
        pieces = self.ops.best_pieces(rows, len(self.weights.head))
        best = scratch.best[: rows * pieces].view(rows, pieces)
        index = scratch.index[: rows * pieces].view(rows, pieces)
        self.ops.head_best(scaled, squares, self.weights.eps, self.weights.head, best, index)
        self.ops.pick(best, index, tokens)

    def logits(self, s: Stream, T: int, last: bool, logits: Tensor) -> None:
        """Logits [M or B, V] of every row, or only of each sequence's last one."""
        scaled, squares = self._rows(s, T, last)
        self.ops.head_logits(scaled, squares, self.weights.eps, self.weights.head, logits)

    @staticmethod
    def _rows(s: Stream, T: int, last: bool) -> tuple[Tensor, Tensor]:
        step = slice(T - 1, None, T) if last else slice(None)
        return s.scaled[step], s.squares[step]


@dataclass
class HeadScratch:
    """Pieces of the vocabulary's best tokens, flat."""

    best: Tensor
    index: Tensor


def head_scratch(ops: Any, vocabulary: int, rows: list[int], device: torch.device) -> HeadScratch:
    """Room for the pieces of passes with any of these numbers of rows."""
    size = max(ops.best_pieces(m, vocabulary) * m for m in rows)
    return HeadScratch(
        torch.zeros(size, device=device), torch.zeros(size, dtype=torch.int32, device=device)
    )
