"""One pass of a packed model over a segment of tokens, as a fixed sequence of operations."""

from dataclasses import dataclass

import torch
from torch import Tensor

from mambactl.decode.gpu.state import LayerWeights, ModelState, PackedModel
from mambactl.kernels.decode.operations import DecodeOps
from mambactl.models.packed import LayerState, PassContext, Residual, Segment


class Pass:
    """Runs segments through one model with one set of operations."""

    def __init__(self, weights: PackedModel, state: ModelState, ops: DecodeOps):
        self.weights, self.state, self.ops = weights, state, ops
        scratch = state.scratch
        self.context = PassContext(
            ops, weights.eps, weights.rotations, scratch.partial, scratch.counter
        )

    def run(self, tokens: Tensor, segment: Segment) -> Residual:
        """tokens int32 [B, T] -> the stream after the last layer, scaled by the final norm."""
        w, rows = self.weights, segment.rows
        s = self._stream(rows)
        self.ops.embed(tokens, w.table, w.layers[0].gain, s.hidden, s.scaled, s.squares)
        gains = [layer.gain for layer in w.layers[1:]] + [w.gain]
        for layer, held, gain in zip(w.layers, self.state.layers, gains, strict=True):
            self._layer(layer, held, gain, s, segment)
        return s

    def _stream(self, rows: int) -> Residual:
        held = self.state.scratch
        pieces = self.ops.square_pieces(rows, held.hidden.shape[1])
        return Residual(
            held.hidden[:rows],
            held.scaled[:rows],
            held.squares[: rows * pieces].view(rows, pieces),
            held.wide,
            held.mixed,
            held.inner,
        )

    def _layer(
        self, layer: LayerWeights, held: LayerState, gain: Tensor, s: Residual, segment: Segment
    ) -> None:
        after = gain if layer.down is None else layer.mlp_gain
        layer.mixer.run(self.context, held, s, segment, after)
        if layer.down is None:
            return
        act = s.inner[: segment.rows * layer.down.shape[1]].view(segment.rows, -1)
        self.ops.swiglu(s.scaled, s.squares, self.weights.eps, layer.gate_up, act)
        self.ops.add_residual(act, layer.down, None, s.hidden, gain, s.scaled, s.squares)

    def best(self, s: Residual, T: int, last: bool, tokens: Tensor, scratch: "HeadScratch") -> None:
        """The argmax of every row, or only of each sequence's last one, into tokens."""
        scaled, squares = self._rows(s, T, last)
        rows = len(scaled)
        pieces = self.ops.best_pieces(rows, len(self.weights.head))
        best = scratch.best[: rows * pieces].view(rows, pieces)
        index = scratch.index[: rows * pieces].view(rows, pieces)
        self.ops.head_best(scaled, squares, self.weights.eps, self.weights.head, best, index)
        self.ops.pick(best, index, tokens)

    def logits(self, s: Residual, T: int, last: bool, logits: Tensor) -> None:
        """Logits [M or B, V] of every row, or only of each sequence's last one."""
        scaled, squares = self._rows(s, T, last)
        self.ops.head_logits(scaled, squares, self.weights.eps, self.weights.head, logits)

    @staticmethod
    def _rows(s: Residual, T: int, last: bool) -> tuple[Tensor, Tensor]:
        step = slice(T - 1, None, T) if last else slice(None)
        return s.scaled[step], s.squares[step]


@dataclass
class HeadScratch:
    """Pieces of the vocabulary's best tokens, flat."""

    best: Tensor
    index: Tensor


def head_scratch(
    ops: DecodeOps, vocabulary: int, rows: list[int], device: torch.device
) -> HeadScratch:
    """Room for the pieces of passes with any of these numbers of rows."""
    size = max(ops.best_pieces(m, vocabulary) * m for m in rows)
    return HeadScratch(
        torch.zeros(size, device=device), torch.zeros(size, dtype=torch.int32, device=device)
    )
