"""Operations of a decode pass for a CPU; `kernels.decode.reference` defines what they compute.

Each is a handful of library calls over all rows, since on a CPU a call costs more than the numbers
of a single token. Buffers are fp32, whatever the products' weights are read in.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mambactl.kernels.byte_matrix import Matrix
from mambactl.kernels.decode.cpu import single
from mambactl.kernels.decode.cpu.pass_rows import Group, Rows
from mambactl.kernels.decode.cpu.products import Products
from mambactl.kernels.decode.cpu.recurrence import advance, gated, heads_of
from mambactl.kernels.decode.operations import AttentionArguments
from mambactl.kernels.decode.reference.ops import ReferenceOps
from mambactl.present import of_kind, present

# where products are in bfloat16, which makes ties of logits that lie close, these are computed once
# more in fp32: so many for sampling, and what is nearly the largest for the best token
EXACT_LOGITS, CLOSE = 64, 2**-6


class CpuOps(ReferenceOps):
    """The reference's operations with Mamba-2, attention, products and norms made fast.

    `bfloat16`: products read copies of the weights in that type.
    """

    on_host = True

    def __init__(self, bfloat16: bool):
        self.products = Products(bfloat16)
        self._rows: dict[tuple[object, ...], Rows] = {}

    def embed(
        self, tokens: Tensor, table: Tensor, gain: Tensor, hidden: Tensor, scaled: Tensor,
        squares: Tensor, factor: float = 1.0,
    ) -> None:  # fmt: skip
        """Start the stream from tokens [B, T]."""
        ids = tokens.reshape(-1).long().clamp_(0, len(table) - 1)  # [M]
        torch.index_select(table, 0, ids, out=hidden)
        if factor != 1:
            hidden *= factor
        _scale(hidden, gain, scaled, squares)

    def project(
        self, scaled: Tensor, squares: Tensor, eps: float, w: Matrix, bias: Tensor | None,
        plain: Tensor, ring: Tensor, start: Tensor, count: Tensor, scale: int, *, T: int,
        offset: int, ring_lo: int, conv: tuple[Tensor, Tensor, Tensor] | None = None,
        rotation: tuple[Tensor, Tensor] | None = None, beside: Sequence[AttentionArguments] = (),
    ) -> None:  # fmt: skip
        """Run the input projection of a recurrent mixer, and of attentions beside it."""
        rows = self._where(start, count, T, offset)
        alone = rows.single
        y = self._normed(scaled, squares, eps, w, bias)  # [M, N]
        write_heads = _write_heads if alone is None else single.write_heads
        for args in reversed(beside):
            y, own = y[:, : -args.rows], y[:, -args.rows :]
            write_heads(rows, own, args, *present(rotation))
        width, slots = ring.shape[2], ring.shape[1]
        plain[:, :ring_lo] = y[:, :ring_lo]
        if ring_lo + width < y.shape[1]:
            plain[:, ring_lo:] = y[:, ring_lo + width :]
        if alone is not None:
            ring[0, alone % slots] = y[0, ring_lo : ring_lo + width]
            if conv is not None:
                single.convolve(rows, ring, *conv, alone % slots)
            return
        index, there = rows.taps(slots)  # [R, 4]
        own = rows.real(y[:, ring_lo : ring_lo + width])
        ring.index_put_((rows.sequence, index[:, -1]), own)
        if conv is None:
            return
        weight, shift, mixed = conv
        seen = ring[rows.sequence[:, None], index, : len(weight)]  # [R, 4, Ch]
        if there is not None:
            seen = seen * there
        made = F.silu((seen * weight.T).sum(1).add_(shift))  # [R, Ch]
        mixed.index_put_((rows.sequence, index[:, -1]), made)

    def project_qkv(
        self, scaled: Tensor, squares: Tensor, eps: float, w: Matrix, bias: Tensor | None,
        cos: Tensor, sin: Tensor, q: Tensor, keys: Tensor, values: Tensor, start: Tensor,
        count: Tensor, scale: int, *, T: int, offset: int, sinks: int = 0, ring: int = 0,
    ) -> None:  # fmt: skip
        """Compute queries, and write keys and values into the cache."""
        rows = self._where(start, count, T, offset)
        y = self._normed(scaled, squares, eps, w, bias)
        args = AttentionArguments(q, keys, values, q, q, q, 1, sinks=sinks, ring=ring)
        write_heads = _write_heads if rows.single is None else single.write_heads
        write_heads(rows, y, args, cos, sin)

    def add_residual(
        self, x: Tensor, w: Matrix, bias: Tensor | None, hidden: Tensor, gain: Tensor,
        scaled: Tensor, squares: Tensor, beside: Sequence[tuple[Tensor, Matrix]] = (),
    ) -> None:  # fmt: skip
        """Add an output projection, or the sum of several, to the residual stream."""
        if beside:
            x = torch.cat([x, *[other for other, _ in beside]], 1)
        weights = [w, *(weight for _, weight in beside)]
        hidden += self.products(x, *(of_kind(Tensor, weight) for weight in weights))
        if bias is not None:
            hidden += bias
        _scale(hidden, gain, scaled, squares)

    def swiglu(self, scaled: Tensor, squares: Tensor, eps: float, w: Matrix, out: Tensor) -> None:
        """Compute the first half of an MLP."""
        gate, up = self._normed(scaled, squares, eps, w, None).chunk(2, 1)  # [M, I]
        torch.mul(F.silu(gate), up, out=out)

    def attention(
        self, q: Tensor, keys: Tensor, values: Tensor, start: Tensor, count: Tensor, scale: int,
        out: Tensor, partial: Tensor | None, counter: Tensor | None, *, T: int, offset: int = 0,
        splits: int, window: int = 0, sinks: int = 0, ring: int = 0,
    ) -> None:  # fmt: skip
        """Attend to the cache."""
        rows = self._where(start, count, T, offset)
        if rows.single is not None:
            single.attend(rows, q, keys, values, out, window, sinks, ring)
            return
        batch, kv_heads, _, width = keys.shape
        if ring == 0:
            longest = rows.longest()
            keys, values = keys[:, :, :longest], values[:, :, :longest]
        hidden = rows.hidden(keys.shape[2], window, sinks, ring)  # [B, 1, T, 1, S]
        # query heads of a key head, for every token: [B, Hk, T G, P]
        query = q.view(batch, T, kv_heads, -1, width).transpose(1, 2)  # [B, Hk, T, G, P]
        group = query.shape[3]
        scores = (query.reshape(batch, kv_heads, -1, width) * width**-0.5) @ keys.mT
        if hidden is not None:
            scores.view(batch, kv_heads, T, group, -1).add_(hidden)
        y = scores.softmax(-1) @ values  # [B, Hk, T G, P]
        made = y.view(batch, kv_heads, T, group, width).transpose(1, 2)
        out.view(batch, T, kv_heads, group, width).copy_(made)

    def mamba2(
        self, ring: Tensor, mixed: Tensor, z: Tensor, state: Tensor, A: Tensor, D: Tensor,
        dt_bias: Tensor, gain: Tensor | None, eps: float, out: Tensor, start: Tensor,
        count: Tensor, base: Tensor, base_next: Tensor, scale: int, *, T: int, offset: int,
        x_heads: int, b_groups: int, c_groups: int, beside: Sequence[AttentionArguments] = (),
    ) -> None:  # fmt: skip
        """Run the recurrence of Mamba-2, and attentions beside it."""
        for args in beside:
            self.attention(
                args.q, args.keys, args.values, start, count, scale, args.out, None, counter=None,
                T=T, offset=offset, splits=1, window=args.window, sinks=args.sinks, ring=args.ring,
            )  # fmt: skip
        rows = self._where(start, count, T, offset)
        stored, following = base.tolist(), base_next.tolist()
        if rows.single is not None and stored == [rows.single] and following == [rows.single + 1]:
            single.recur(
                rows.single % ring.shape[1], ring, mixed, z, state, A, D, dt_bias, gain=gain,
                eps=eps, out=out, heads=(x_heads, b_groups, c_groups),
            )  # fmt: skip
            return
        heads, size, width = state.shape[1:]
        sizes = [x_heads * width, b_groups * size, c_groups * size]
        for group in rows.recurrences(stored, following):
            at = (group.sequences[:, None], group.positions % ring.shape[1])
            raw, dt = mixed[at], ring[at][..., mixed.shape[2] :]  # [n, L, Ch], [n, L, H]
            x, B, C = raw.split(sizes, -1)
            x, B = heads_of(x, x_heads, heads), heads_of(B, b_groups, heads)
            C = heads_of(C[:, -group.fresh :], c_groups, heads)
            dt = F.softplus(dt + dt_bias).mT  # [n, H, L]
            held, alone = _held(state, group)
            y, after = advance(held, x, dt, dt * A[:, None], B, C, group)
            if group.keep and not alone:
                state.index_copy_(0, group.sequences, after)
            y = y + D[:, None, None] * x[:, :, -group.fresh :]
            out[group.rows] = gated(y, z[group.rows], gain, eps)

    def head_best(
        self, scaled: Tensor, squares: Tensor, eps: float, w: Tensor, best: Tensor, index: Tensor
    ) -> None:
        """Find the best token of every row."""
        x = _normalise(scaled, squares, eps)
        y = self.products(x, w)  # [M, V]
        if self.products.bfloat16:
            highest = y.amax(1, keepdim=True)
            row, token = (y >= highest - CLOSE * highest.abs()).nonzero(as_tuple=True)  # [n]
            y[row, token] = (w[token] * x[row]).sum(1)
        best[:, 0], found = y.max(1)
        index[:, 0] = found

    def head_logits(
        self, scaled: Tensor, squares: Tensor, eps: float, w: Tensor, logits: Tensor
    ) -> None:
        """Compute all logits."""
        x = _normalise(scaled, squares, eps)
        y = self.products(x, w)  # [M, own V]
        if self.products.bfloat16:
            likely = y.topk(min(EXACT_LOGITS, len(w)), 1).indices  # [M, n]
            y.scatter_(1, likely, (w[likely] @ x[..., None])[..., 0])
        logits.fill_(float("-inf"))
        logits[:, : y.shape[1]] = y[:, : logits.shape[1]]

    def draft_ngram(
        self, history: Tensor, lengths: Tensor, drafts: Tensor, width: int, n_drafted: Tensor,
        *, longest: int = 3,
    ) -> None:  # fmt: skip
        """Draft from earlier occurrences in the text."""
        for row, length in enumerate(lengths.tolist()):
            text = history[row, :length]
            found = text[_follower(text, longest) :][:width]
            n_drafted[row] = len(found)
            drafts[row, :width] = 0
            drafts[row, : len(found)] = found

    def _normed(
        self, scaled: Tensor, squares: Tensor, eps: float, w: Matrix, bias: Tensor | None
    ) -> Tensor:
        """norm(stream) W^T + bias [M, N]."""
        y = self.products(_normalise(scaled, squares, eps), of_kind(Tensor, w))
        return y if bias is None else y.add_(bias)

    def _where(self, start: Tensor, count: Tensor, T: int, offset: int) -> Rows:
        first, active = start.tolist(), count.tolist()
        key = (*first, *active, T, offset)
        if key not in self._rows:
            # layers ask one after the other, and a draft's pass comes between two of the target's
            if len(self._rows) > 4:
                self._rows.clear()
            self._rows[key] = Rows(first, active, T, offset)
        return self._rows[key]


def _scale(hidden: Tensor, gain: Tensor, scaled: Tensor, squares: Tensor) -> None:
    torch.mul(hidden, gain, out=scaled)
    torch.sum(hidden.square(), 1, keepdim=True, out=squares)


def _normalise(scaled: Tensor, squares: Tensor, eps: float) -> Tensor:
    return scaled * squares.mul(1 / scaled.shape[1]).add_(eps).rsqrt_()


def _held(state: Tensor, group: Group) -> tuple[Tensor, bool]:
    """The states [n, H, N, P] of a group, and whether they are the stored ones themselves."""
    alone = len(group.sequences) == len(state)
    return (state if alone else state[group.sequences]), alone


def _follower(text: Tensor, longest: int) -> int:
    """Index after the latest earlier match of the longest suffix of text [S]; S if none.

    As `kernels.decode.reference.ngram`, which tries suffixes of `longest` tokens first.
    """
    data, size = text.numpy().tobytes(), text.element_size()
    for suffix in range(min(longest, len(text)), 0, -1):
        wanted, end = data[-suffix * size :], len(data) - size
        while (found := data.rfind(wanted, 0, end)) >= 0:
            if found % size == 0:
                return found // size + suffix
            # bytes of two tokens
            end = found + len(wanted) - 1
    return len(text)


def _write_heads(rows: Rows, y: Tensor, args: AttentionArguments, cos: Tensor, sin: Tensor) -> None:
    """Rotated queries of y [M, (H + 2 Hk) P] to args.q, keys and values to their slots."""
    kv_heads, width = args.keys.shape[1], args.keys.shape[3]
    y = y.view(len(y), -1, width)  # [M, H + 2 Hk, P]
    plain = y[:, :-kv_heads]
    c, s = rows.angles(cos, sin)
    rotated = plain * c + plain.roll(width // 2, -1) * s
    args.q.view(len(y), -1, width).copy_(rotated[:, :-kv_heads])
    slots = rows.slots(args.sinks, args.ring)
    at = (rows.sequence, slice(None), slots)
    args.keys[at] = rows.real(rotated[:, -kv_heads:])
    args.values[at] = rows.real(y[:, -kv_heads:])
