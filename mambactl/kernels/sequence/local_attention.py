"""Attention to a window of tokens with sinks, without gradients: no copies, no mask, no scores.

See `kernels.local_attention`. A program has a tile of queries of one head, and visits the sinks and
the few tiles of keys that the window reaches.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mambactl.kernels.launch import dot, launch_options
from mambactl.kernels.sequence.packed_attention import (
    absorb,
    head_rows,
    last_contiguous,
    put_rows,
    sizes_of,
)


@triton.jit
def _visit(query, k, v, k_t, v_t, row, p, T, seen, scale, acc, top, total, P: tl.constexpr):
    """Add the keys and values of `row` [N] to the sums of queries [M, P] that see them [M, N]."""
    scores = tl.zeros([query.shape[0], row.shape[0]], tl.float32)
    scores = dot(query, tl.trans(head_rows(k, k_t, row, p, T, P)), scores) * scale
    scores = tl.where(seen, scores, float("-inf"))
    return absorb(scores, head_rows(v, v_t, row, p, T, P), acc, top, total)


@triton.jit(do_not_specialize=["T"])
def _local_kernel(
    q, k, v, start, out, T, scale, q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t,
    H: tl.constexpr, KH: tl.constexpr, P: tl.constexpr, WINDOW: tl.constexpr, SINKS: tl.constexpr,
    HELD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BS: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """Keys and values are SINKS + WINDOW - 1 held ones, if HELD, and those of the queries."""
    tile, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    m, p = tile * BM + tl.arange(0, BM), tl.arange(0, BP)
    before: tl.constexpr = SINKS + WINDOW - 1 if HELD else 0
    # rows count from the first query, and held ones lie before it
    k += b * k_b + h // (H // KH) * k_h + before * k_t
    v += b * v_b + h // (H // KH) * v_h + before * v_t
    query = head_rows(q + b * q_b + h * q_h, q_t, m, p, T, P)
    acc = tl.zeros([BM, BP], tl.float32)
    top = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    begin = tl.load(start + b).to(tl.int32) if HELD else 0
    if SINKS > 0:
        j = tl.arange(0, BS)
        at = j - begin
        row = tl.where(at < 0, j - before, at)
        # as if past the end
        row = tl.where(j < SINKS, row, T)
        past = (j < SINKS)[None, :] & (at[None, :] <= m[:, None])
        acc, top, total = _visit(query, k, v, k_t, v_t, row, p, T, past, scale, acc, top, total, P)
    first = tile * BM - (WINDOW - 1)
    if not HELD:
        first = tl.maximum(first, 0)
    for s in range(first, tl.minimum(tile * BM + BM, T), BN):
        n = s + tl.arange(0, BN)
        seen = (n[None, :] <= m[:, None]) & (n[None, :] > m[:, None] - WINDOW)
        seen = seen & (n + begin >= SINKS)[None, :]
        acc, top, total = _visit(query, k, v, k_t, v_t, n, p, T, seen, scale, acc, top, total, P)
    total = tl.where(m < T, total, 1.0)
    put_rows(out + (b * T * H + h) * P, H * P, m, p, T, acc / total[:, None], P)


def attend(
    q: Tensor, k: Tensor, v: Tensor, window: int, sinks: int, start: Tensor | None = None
) -> Tensor:
    """softmax(q k^T / sqrt(P)) v [B, T, H, P] over the last `window` keys and the first `sinks`.

    q [B, H, T, P]; k and v [B, Hk, T, P] from position 0 on, or with `start` [B] behind what
    `kernels.local_attention.attend_behind` says, [B, Hk, S + W - 1 + T, P].
    """
    batch, heads, length, width = q.shape
    q, k, v = last_contiguous(q, k, v)
    y = torch.empty(batch, length, heads, width, dtype=q.dtype, device=q.device)
    sizes, scale = sizes_of(q, k)
    _local_kernel[(triton.cdiv(length, sizes["BM"]), heads, batch)](
        q, k, v, q if start is None else start.contiguous(), y, length, scale, *q.stride()[:3],
        *k.stride()[:3], *v.stride()[:3], **sizes, WINDOW=window, SINKS=sinks,
        HELD=start is not None, BS=max(16, triton.next_power_of_2(sinks)),
        **launch_options(False, num_warps=4, num_stages=2),
    )  # fmt: skip
    return y
