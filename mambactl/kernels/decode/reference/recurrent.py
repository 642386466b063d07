"""One decode pass through a Mamba mixer, on rings of raw projections.

A ring [B, R, C] holds, at slot position % R, what the input projection made of the newest tokens.
`state` is the state before position `base[b]`; a pass replays the ring from there, so rejecting
tokens is no work at all: the next pass starts earlier. Where `base_next[b]` differs from `base[b]`
the state before `base_next[b]` (at most the segment's end) is stored; the caller then moves
`base`. The ring must still hold the three positions before the segment, which its convolution
needs; `mixed` is a second ring, of convolved columns.
Replay and new tokens are one loop, so how tokens are cut into segments cannot change a bit.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mambactl.kernels import reference
from mambactl.kernels.decode.operations import AttentionArguments
from mambactl.kernels.decode.reference.decode_attention import decode_attention
from mambactl.kernels.decode.reference.linear import (
    TAPS,
    convolved,
    ring_rows,
    segment_positions,
    wide,
)
from mambactl.present import present


def _states(
    step: reference.Step, state: Tensor, records: reference.Records, C: Tensor, keep: int
) -> tuple[Tensor, Tensor]:
    """Outputs of every token, and the state after `keep` of them."""
    head = tuple(r[:, :keep] for r in records)
    tail = tuple(r[:, keep:] for r in records)
    y_head, middle = reference.run(step, state, head, C[:, :keep])
    y_tail, _ = reference.run(step, middle, tail, C[:, keep:])
    if keep == 0:
        return y_tail, middle
    return torch.cat([y_head, y_tail.to(y_head.dtype)], 1) if y_tail.shape[1] else y_head, middle


def mamba2_segment(
    ring: Tensor, mixed: Tensor, z: Tensor, state: Tensor, A: Tensor, D: Tensor, dt_bias: Tensor,
    gain: Tensor | None, eps: float, out: Tensor, start: Tensor, count: Tensor, base: Tensor,
    base_next: Tensor, scale: int, *, T: int, offset: int, x_heads: int, b_groups: int,
    c_groups: int, beside: Sequence[AttentionArguments] = (),
) -> None:  # fmt: skip
    """Mamba-2 (arXiv 2405.21060). `mixed` [B, R, Ch] holds convolved x, B, C, and the last H
    columns of the ring dt; state [B, H, N, P] fp32; z and out [M, H P]; A [H] negative.

    out = y SiLU(z) for y = S C + D x; with `gain` [H P] it is also RMS-normed within each head.
    The attentions `beside` are independent of it, and each writes its own `out`.
    """
    for args in beside:
        decode_attention(
            args.q, args.keys, args.values, start, count, scale, args.out, args.partial,
            counter=args.counter, T=T, offset=offset, splits=args.splits, window=args.window,
            sinks=args.sinks, ring=args.ring,
        )  # fmt: skip
    batch, heads, size, width = state.shape
    n_x, n_b = x_heads * width, b_groups * size
    step = reference.bind(reference.ssd_step, wide(A))
    for b in range(batch):
        n_new = int(count[b]) * scale
        first, begin = int(base[b]), int(start[b]) + offset
        end = begin + n_new
        if n_new <= 0 or end <= first:
            continue
        x, B, C = ring_rows(mixed[b], first, end).split([n_x, n_b, c_groups * size], -1)
        x = x.unflatten(-1, (x_heads, width)).repeat_interleave(heads // x_heads, 2)
        B, C = B.unflatten(-1, (b_groups, size)), C.unflatten(-1, (c_groups, size))
        raw = ring_rows(ring[b], first, end)[..., mixed.shape[2] :]
        dt = F.softplus(raw + wide(dt_bias))  # [1, L, H]
        keep = int(base_next[b]) - first
        held = wide(state[b : b + 1]).mT  # [1, H, P, N]
        y, middle = _states(step, held, (x, dt, B), C, keep)
        y = (y + wide(D)[:, None] * x)[0]  # [L, H, P]
        if keep:
            state[b] = middle[0].mT
        seen = range(max(begin, first), end)
        rows = [b * T + at - begin for at in seen]
        kept = y[[at - first for at in seen]]  # [new, H, P]
        gated = kept * F.silu(wide(z[rows])).view_as(kept)
        if gain is not None:
            gated = gated * torch.rsqrt(gated.square().mean(-1, keepdim=True) + eps)
            gated = gated * wide(gain).view(heads, width)
        out[rows] = gated.flatten(1).to(out.dtype)


def rotate(
    mixed: Tensor, cos: Tensor, sin: Tensor, start: Tensor, count: Tensor, scale: int, *, T: int,
    offset: int, groups: int,
) -> None:  # fmt: skip
    """Rotate B and C of the real rows in place by their positions (RoFormer, arXiv 2104.09864).

    They are the last `groups` groups of N columns of `mixed` [B, R, Ch]; cos and sin hold a row
    [N / 2] for every position.
    """
    size = 2 * cos.shape[1]
    at, real = segment_positions(start, count, scale, T=T, offset=offset)
    b, t = real.nonzero(as_tuple=True)
    slots = b, at[b, t] % mixed.shape[1]
    rows = mixed[slots]  # [real, Ch]
    low, high = wide(rows[:, -groups * size :]).unflatten(1, (groups, size)).chunk(2, -1)
    c, s = cos[at[b, t]][:, None], sin[at[b, t]][:, None]  # [real, 1, N / 2]
    rotated = torch.cat([low * c - high * s, high * c + low * s], -1).flatten(1)
    mixed[slots] = torch.cat([rows[:, : -groups * size], rotated.to(mixed.dtype)], 1)


def grouped_norm(y: Tensor, gain: Tensor, eps: float, groups: int) -> None:
    """RMSNorm of y [M, D] in place, within each of `groups` equal slices."""
    parts = wide(y).unflatten(1, (groups, -1))
    parts = parts * torch.rsqrt(parts.square().mean(-1, keepdim=True) + eps)
    y.copy_(parts.flatten(1) * wide(gain))


def mamba1_low(
    mixed: Tensor, w: Tensor, low: Tensor, start: Tensor, count: Tensor, scale: int, *, T: int,
    offset: int,
) -> None:  # fmt: skip
    """x_proj of native Mamba-1: low [B, R, J] = mixed [B, R, Ch] w^T at the real rows' slots."""
    at, real = segment_positions(start, count, scale, T=T, offset=offset)
    b, t = real.nonzero(as_tuple=True)
    slot = at[b, t] % low.shape[1]
    low[b, slot] = (wide(mixed[b, slot]) @ wide(w).T).to(low.dtype)


def spread(columns: int, piece: int, repeat: int) -> Tensor:
    """Source column of each of `columns`, where pieces of `piece` columns repeat `repeat` times."""
    d = torch.arange(columns)
    return d // (piece * repeat) * piece + d % piece


def mamba1_segment(
    ring: Tensor, mixed: Tensor | None, low: Tensor | None, z: Tensor, state: Tensor,
    conv_weight: Tensor, conv_bias: Tensor, dt_weight: Tensor, dt_bias: Tensor, A: Tensor,
    D: Tensor, out: Tensor, start: Tensor, count: Tensor, base: Tensor, base_next: Tensor,
    scale: int, *, T: int, offset: int, piece: int, repeat: int,
) -> None:  # fmt: skip
    """Mamba-1 (arXiv 2312.00752): state [B, Ch, N] fp32, A [Ch, N] negative, z and out [M, Ch].

    Native form: mixed [B, R, Ch] is the convolved x, low [B, R, dt_rank + 2 N] is dt, B, C from
    x_proj. Attention form (neither): ring columns are x, B (both repeated in pieces to Ch), C, dt.
    """
    batch, channels, size = state.shape
    rank = dt_weight.shape[1]
    step = reference.bind(reference.selective_step, wide(A))
    source = spread(channels, piece, repeat).to(ring.device)
    n_x = channels // repeat
    for b in range(batch):
        n_new = int(count[b]) * scale
        first, begin = int(base[b]), int(start[b]) + offset
        end = begin + n_new
        if n_new <= 0 or end <= first:
            continue
        if low is None:
            raw = ring_rows(ring[b], first - TAPS + 1, end)
            x = convolved(raw[..., source], conv_weight, conv_bias)  # [1, L, Ch]
            later = raw[:, TAPS - 1 :]
            B, C = later[..., n_x + source], later[..., 2 * n_x : 2 * n_x + channels]
            step_low = later[..., 2 * n_x + channels :]
        else:
            x = ring_rows(present(mixed)[b], first, end)
            step_low, B, C = ring_rows(low[b], first, end).split([rank, size, size], -1)
        dt = F.softplus(step_low @ wide(dt_weight).T + wide(dt_bias))  # [1, L, Ch]
        B, C = B.unflatten(-1, (-1, size)), C.unflatten(-1, (-1, size))
        keep = int(base_next[b]) - first
        y, middle = _states(step, wide(state[b : b + 1]), (x, dt, B), C, keep)
        y = (y + wide(D) * x)[0]  # [L, Ch]
        if keep:
            state[b] = middle[0]
        seen = range(max(begin, first), end)
        rows = [b * T + at - begin for at in seen]
        kept = y[[at - first for at in seen]]
        out[rows] = (kept * F.silu(wide(z[rows]))).to(out.dtype)
