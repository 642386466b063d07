"""Matrix products of a decode pass, with the norms, rotations and writes around them.

The residual stream travels as three tensors: `hidden` [M, D]; `scaled` [M, D], the stream times
the weight of the norm that reads it next; `squares` [M, S], whose row sums are the stream's sums
of squares. RMSNorm (arXiv 1910.07467) is then a factor on the product's rows. Positions
are `start[b] + offset + t`; row t is real where t < count[b] * scale and its position is not
negative, and only real rows are written to rings and caches.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mambactl.kernels import reference
from mambactl.kernels.byte_matrix import ByteMatrix, Matrix
from mambactl.kernels.decode.operations import AttentionArguments
from mambactl.kernels.decode.reference.slots import slot_of
from mambactl.present import present

TAPS = 4


def wide(x: Tensor) -> Tensor:
    """fp32, or fp64 for fp64 input."""
    return x if x.dtype == torch.float64 else x.float()


def times(x: Tensor, w: Matrix) -> Tensor:
    """Multiply x [M, K] by W^T: [M, N] in fp32, or fp64 for fp64 input."""
    x = wide(x)
    return x @ (w.dense(x.dtype) if isinstance(w, ByteMatrix) else wide(w)).T


def segment_positions(
    start: Tensor, count: Tensor, scale: int, *, T: int, offset: int
) -> tuple[Tensor, Tensor]:
    """Positions [B, T] of the segment's rows and which of them are real."""
    t = torch.arange(T, device=start.device)
    at = start[:, None].long() + offset + t  # [B, T]
    return at, (t < count[:, None] * scale) & (at >= 0)


def normed(scaled: Tensor, squares: Tensor, eps: float, w: Matrix, bias: Tensor | None) -> Tensor:
    """norm(stream) W^T + bias [M, N] in fp32."""
    rate = torch.rsqrt(wide(squares).sum(1, keepdim=True) / scaled.shape[1] + eps)  # [M, 1]
    y = times(scaled, w) * rate  # [M, N]
    return y if bias is None else y + wide(bias)


def put_stream(
    stream: Tensor, gain: Tensor, hidden: Tensor, scaled: Tensor, squares: Tensor
) -> None:
    """Write a new residual stream [M, D] in its three forms."""
    hidden.copy_(stream)
    scaled.copy_(wide(stream) * wide(gain))
    squares.zero_()
    squares[:, 0] = wide(stream).square().sum(1)


def embed(
    tokens: Tensor, table: Tensor, gain: Tensor, hidden: Tensor, scaled: Tensor, squares: Tensor,
    factor: float = 1.0,
) -> None:  # fmt: skip
    """Start the stream from tokens [B, T]; ids outside the table take its first or last row."""
    rows = tokens.reshape(-1).long().clamp(0, len(table) - 1)  # [M]
    stream = table[rows] if factor == 1 else (wide(table[rows]) * factor).to(hidden.dtype)
    put_stream(stream, gain, hidden, scaled, squares)


def read_plainly(hidden: Tensor, scaled: Tensor, squares: Tensor, eps: float) -> None:
    """Let the stream [M, D] be read without a norm: by one that divides by 1."""
    scaled.copy_(hidden)
    squares.zero_()
    squares[:, 0] = hidden.shape[1] * (1 - eps)


def add_normed(
    scaled: Tensor, squares: Tensor, eps: float, hidden: Tensor, gain: Tensor | None,
    out_scaled: Tensor, out_squares: Tensor,
) -> None:  # fmt: skip
    """hidden += norm(another stream), by its scaled form and its squares; `gain` [D] is of the
    norm that reads the result next, None where it is read as it is. Outputs may be inputs.
    """
    rate = torch.rsqrt(wide(squares).sum(1, keepdim=True) / hidden.shape[1] + eps)  # [M, 1]
    stream = hidden + (wide(scaled) * rate).to(hidden.dtype)
    if gain is not None:
        put_stream(stream, gain, hidden, out_scaled, out_squares)
        return
    hidden.copy_(stream)
    read_plainly(hidden, out_scaled, out_squares, eps)


def project(
    scaled: Tensor, squares: Tensor, eps: float, w: Matrix, bias: Tensor | None, plain: Tensor,
    ring: Tensor, start: Tensor, count: Tensor, scale: int, *, T: int, offset: int, ring_lo: int,
    conv: tuple[Tensor, Tensor, Tensor] | None = None,
    rotation: tuple[Tensor, Tensor] | None = None, beside: Sequence[AttentionArguments] = (),
) -> None:  # fmt: skip
    """norm(stream) W^T: columns from `ring_lo` on to ring [B, R, C] at slot position % R, as many
    as it has; the other columns to plain [M, N - C].

    `conv` (weight [Ch, 4], bias [Ch], mixed [B, R, Ch]) asks for SiLU(conv(ring)) of the ring's
    first Ch columns at the real rows too, in the same slots of another ring. The last rows of w
    are those of the attentions `beside`, one after the other, each as `project_qkv` takes them,
    with `rotation` (cos, sin).
    """
    for args in reversed(beside):
        w, own = w[: -args.rows], w[-args.rows :]
        shift = None
        if bias is not None:
            bias, shift = bias[: -args.rows], bias[-args.rows :]
        cos, sin = present(rotation)
        project_qkv(
            scaled, squares, eps, own, shift, cos, sin, args.q, keys=args.keys, values=args.values,
            start=start, count=count, scale=scale, T=T, offset=offset, sinks=args.sinks,
            ring=args.ring,
        )  # fmt: skip
    y = normed(scaled, squares, eps, w, bias).to(plain.dtype)  # [M, N]
    width, slots = ring.shape[2], ring.shape[1]
    plain.copy_(torch.cat([y[:, :ring_lo], y[:, ring_lo + width :]], 1))
    at, real = segment_positions(start, count, scale, T=T, offset=offset)
    b, t = real.nonzero(as_tuple=True)
    ring[b, at[b, t] % slots] = y.view(len(start), T, -1)[b, t, ring_lo : ring_lo + width]
    if conv is not None:
        weight, shift, mixed = conv
        for row, last in zip(b.tolist(), at[b, t].tolist(), strict=True):
            raw = ring_rows(ring[row], last - TAPS + 1, last + 1)[..., : len(weight)]
            mixed[row, last % slots] = convolved(raw, weight, shift)[0, 0].to(mixed.dtype)


def ring_rows(ring: Tensor, first: int, last: int) -> Tensor:
    """Raw rows [1, last - first, C] of one sequence's ring [R, C]; zeros before position 0."""
    at = torch.arange(first, last, device=ring.device)
    return wide(ring[at % len(ring)]).masked_fill((at < 0)[:, None], 0)[None]


def convolved(raw: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """SiLU(conv) of all but the first three rows; raw [1, 3 + L, Ch], weight [Ch, 4]."""
    before, x = raw[:, : TAPS - 1], raw[:, TAPS - 1 :]
    return F.silu(reference.causal_conv1d(x, wide(weight), wide(bias), before))


def project_qkv(
    scaled: Tensor, squares: Tensor, eps: float, w: Matrix, bias: Tensor | None, cos: Tensor,
    sin: Tensor, q: Tensor, keys: Tensor, values: Tensor, start: Tensor, count: Tensor, scale: int,
    *, T: int, offset: int, sinks: int = 0, ring: int = 0,
) -> None:  # fmt: skip
    """Rows of w [(H + 2 Hk) P, K] are q, k, v. Rotated q [M, H P] (real rows only); rotated keys
    and values to the caches [B, Hk, S, P], at the slots that `slots.slot_of` gives their
    positions. cos and sin hold a row [P / 2] for every position.
    """
    batch, kv_heads, _, width = keys.shape
    y = normed(scaled, squares, eps, w, bias).to(q.dtype)  # [M, N]
    y = y.view(batch, T, -1, width)  # [B, T, H + 2 Hk, P]
    at, real = segment_positions(start, count, scale, T=T, offset=offset)
    b, t = real.nonzero(as_tuple=True)
    heads = wide(y[b, t])  # [real, H + 2 Hk, P]
    c, s = cos[at[b, t]][:, None], sin[at[b, t]][:, None]  # [real, 1, P / 2]
    low, high = heads[:, :-kv_heads].chunk(2, -1)
    rotated = torch.cat([low * c - high * s, high * c + low * s], -1).to(q.dtype)
    q.view(batch, T, -1, width)[b, t] = rotated[:, :-kv_heads]
    slot = slot_of(at[b, t], sinks, ring)
    keys[b, :, slot] = rotated[:, -kv_heads:]
    values[b, :, slot] = y[b, t][:, -kv_heads:]


def add_residual(
    x: Tensor, w: Matrix, bias: Tensor | None, hidden: Tensor, gain: Tensor, scaled: Tensor,
    squares: Tensor, beside: Sequence[tuple[Tensor, Matrix]] = (),
) -> None:  # fmt: skip
    """stream += x W^T + bias for x [M, K]; `beside` holds (x, w) of more products in the sum."""
    y = times(x, w)
    for other, weight in beside:
        y = y + times(other, weight)
    y = y if bias is None else y + wide(bias)
    put_stream(hidden + y.to(hidden.dtype), gain, hidden, scaled, squares)


def swiglu(scaled: Tensor, squares: Tensor, eps: float, w: Matrix, out: Tensor) -> None:
    """SiLU(gate) * up [M, I]; rows of w [2 I, K] are gate, then up."""
    gate, up = normed(scaled, squares, eps, w, None).to(out.dtype).chunk(2, 1)  # [M, I]
    out.copy_(F.silu(wide(gate)).to(out.dtype) * up)


def head_best(
    scaled: Tensor, squares: Tensor, eps: float, w: Tensor, best: Tensor, index: Tensor
) -> None:
    """Largest logit and its token of every piece of the vocabulary, [M, pieces]."""
    y = normed(scaled, squares, eps, w, None)  # [M, V]
    best.fill_(float("-inf"))
    index.fill_(2**31 - 1)
    best[:, 0], found = y.max(1)
    index[:, 0] = found.int()


def head_logits(scaled: Tensor, squares: Tensor, eps: float, w: Tensor, logits: Tensor) -> None:
    """Logits [M, V] in fp32; tokens beyond the model's own vocabulary get -inf."""
    y = normed(scaled, squares, eps, w, None)  # [M, own V]
    logits.fill_(float("-inf"))
    logits[:, : y.shape[1]] = y[:, : logits.shape[1]]


def pick(best: Tensor, best_index: Tensor, tokens: Tensor) -> None:
    """The token of the largest logit [M], the lowest where several are equal."""
    top = best.amax(1, keepdim=True)
    tokens.copy_(best_index.masked_fill(best != top, 2**31 - 1).amin(1))
