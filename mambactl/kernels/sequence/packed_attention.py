"""Attention of packed rows with gradients: every query sees one stretch of keys that ends with it.

FlashAttention-2 (arXiv 2307.08691): no score leaves a tile. Documents and sliding windows both say
the first key that a query sees, `starts`, and the end of the queries that see a key, `ends`; both
grow along a row, so a tile's loop covers only tiles that some of its tokens see. Query heads that
share a key are summed by the program that owns the key, in a fixed order.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from mambactl.kernels.launch import dot, launch_options, rounded

LOG2_E = tl.constexpr(1.4426950408889634)
# queries and keys per tile
TILES = {torch.bfloat16: (64, 64), torch.float16: (64, 64), torch.float32: (32, 32)}


@triton.jit
def head_rows(ptr, stride, at, cols, T, P: tl.constexpr):
    """Rows of a head [rows, P]; zeros past the end."""
    inside = (at < T)[:, None] & (cols < P)[None, :]
    return tl.load(ptr + at.to(tl.int64)[:, None] * stride + cols[None, :], mask=inside, other=0.0)


@triton.jit
def put_rows(ptr, stride, at, cols, T, value, P: tl.constexpr):
    """Store what `head_rows` would load."""
    inside = (at < T)[:, None] & (cols < P)[None, :]
    pointer = ptr + at.to(tl.int64)[:, None] * stride + cols[None, :]
    tl.store(pointer, rounded(value, ptr.dtype.element_ty), mask=inside)


@triton.jit
def _scores(q, k, start, m, n, scale):
    """Scores [M, N] in powers of two, -inf where key n is not for query m."""
    scores = dot(q, tl.trans(k), tl.zeros([m.shape[0], n.shape[0]], tl.float32)) * scale
    seen = (n[None, :] >= start[:, None]) & (n[None, :] <= m[:, None])
    return tl.where(seen, scores, float("-inf"))


@triton.jit
def absorb(scores, value, acc, top, total):
    """One tile of an attention: its scores [M, N], in powers of two, and its values [N, P].

    acc [M, P] and total [M] are sums weighed by 2 to the power of score - top.
    """
    highest = tl.maximum(top, tl.max(scores, 1))
    # queries that saw no key yet, and rows past the end
    base = tl.where(highest == float("-inf"), 0.0, highest)
    weight = tl.exp2(scores - base[:, None])
    fade = tl.exp2(top - base)
    acc = dot(rounded(weight, value.dtype), value, acc * fade[:, None])
    return acc, highest, total * fade + tl.sum(weight, 1)


@triton.jit
def _forward_kernel(
    q, k, v, starts, out, sums, T, scale, q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t,
    H: tl.constexpr, KH: tl.constexpr, P: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BP: tl.constexpr,
):  # fmt: skip
    # the last tile of a row has the most to do, so it starts first
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    h, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    m, p = tile * BM + tl.arange(0, BM), tl.arange(0, BP)
    q += b * q_b + h * q_h
    k += b * k_b + h // (H // KH) * k_h
    v += b * v_b + h // (H // KH) * v_h
    starts += b * T
    start = tl.load(starts + m, mask=m < T, other=0)  # [M]
    query = head_rows(q, q_t, m, p, T, P)
    acc = tl.zeros([BM, BP], tl.float32)
    top = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    first = tl.load(starts + tile * BM) // BN * BN
    for s in range(first, tl.minimum(tile * BM + BM, T), BN):
        n = s + tl.arange(0, BN)
        scores = _scores(query, head_rows(k, k_t, n, p, T, P), start, m, n, scale)
        value = head_rows(v, v_t, n, p, T, P)
        acc, top, total = absorb(scores, value, acc, top, total)
    total = tl.where(m < T, total, 1.0)
    put_rows(out + (b * T * H + h) * P, H * P, m, p, T, acc / total[:, None], P)
    tl.store(sums + (b * H + h) * T + m, top + tl.log2(total), mask=m < T)


@triton.jit
def _query_kernel(
    q, k, v, starts, out, dy, sums, dq, dots, T, scale, q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h,
    v_t, y_b, y_h, y_t,
    H: tl.constexpr, KH: tl.constexpr, P: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BP: tl.constexpr,
):  # fmt: skip
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    h, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    m, p = tile * BM + tl.arange(0, BM), tl.arange(0, BP)
    q += b * q_b + h * q_h
    k += b * k_b + h // (H // KH) * k_h
    v += b * v_b + h // (H // KH) * v_h
    starts += b * T
    row = (b * H + h) * T + m
    start = tl.load(starts + m, mask=m < T, other=0)
    query = head_rows(q, q_t, m, p, T, P)
    grad = head_rows(dy + b * y_b + h * y_h, y_t, m, p, T, P)
    mixed = head_rows(out + (b * T * H + h) * P, H * P, m, p, T, P)
    shift = tl.sum(grad.to(tl.float32) * mixed.to(tl.float32), 1)  # [M]
    tl.store(dots + row, shift, mask=m < T)
    total = tl.load(sums + row, mask=m < T, other=0.0)
    acc = tl.zeros([BM, BP], tl.float32)
    first = tl.load(starts + tile * BM) // BN * BN
    for s in range(first, tl.minimum(tile * BM + BM, T), BN):
        n = s + tl.arange(0, BN)
        key = head_rows(k, k_t, n, p, T, P)
        weight = tl.exp2(_scores(query, key, start, m, n, scale) - total[:, None])
        value = head_rows(v, v_t, n, p, T, P)
        inner = dot(grad, tl.trans(value), tl.zeros([BM, BN], tl.float32))
        acc = dot(rounded(weight * (inner - shift[:, None]), key.dtype), key, acc)
    # scale is in powers of two
    put_rows(dq + (b * T * H + h) * P, H * P, m, p, T, acc * (scale / LOG2_E), P)


@triton.jit
def _key_kernel(
    q, k, v, starts, ends, dy, sums, dots, dk, dv, T, scale, q_b, q_h, q_t, k_b, k_h, k_t, v_b,
    v_h, v_t, y_b, y_h, y_t,
    H: tl.constexpr, KH: tl.constexpr, P: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BP: tl.constexpr,
):  # fmt: skip
    # the first tile of a row has the most to do
    tile, g, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    n, p = tile * BN + tl.arange(0, BN), tl.arange(0, BP)
    key = head_rows(k + b * k_b + g * k_h, k_t, n, p, T, P)
    value = head_rows(v + b * v_b + g * v_h, v_t, n, p, T, P)
    starts += b * T
    acc_k = tl.zeros([BN, BP], tl.float32)
    acc_v = tl.zeros([BN, BP], tl.float32)
    end = tl.load(ends + b * T + tl.minimum(tile * BN + BN, T) - 1)
    for i in range(H // KH):
        h = g * (H // KH) + i
        for s in range(tile * BN // BM * BM, end, BM):
            m = s + tl.arange(0, BM)
            row = (b * H + h) * T + m
            start = tl.load(starts + m, mask=m < T, other=T)
            query = head_rows(q + b * q_b + h * q_h, q_t, m, p, T, P)
            total = tl.load(sums + row, mask=m < T, other=0.0)
            weight = tl.exp2(_scores(query, key, start, m, n, scale) - total[:, None])
            grad = head_rows(dy + b * y_b + h * y_h, y_t, m, p, T, P)
            acc_v = dot(tl.trans(rounded(weight, grad.dtype)), grad, acc_v)
            inner = dot(grad, tl.trans(value), tl.zeros([BM, BN], tl.float32))
            shift = tl.load(dots + row, mask=m < T, other=0.0)
            inner = rounded(weight * (inner - shift[:, None]), query.dtype)
            acc_k = dot(tl.trans(inner), query, acc_k)
    first = (b * T * KH + g) * P
    put_rows(dk + first, KH * P, n, p, T, acc_k * (scale / LOG2_E), P)
    put_rows(dv + first, KH * P, n, p, T, acc_v, P)


def attend(q: Tensor, k: Tensor, v: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    """softmax(q k^T / sqrt(P)) v over keys starts[t]..t, for bf16 or fp32.

    q [B, H, T, P], k and v [B, Hk, T, P] with any strides; starts [B, T] int32, contiguous.
    Returns y [B, T, H, P] and log2 of the sums of exponentials [B, H, T], fp32.
    """
    batch, heads, length, width = q.shape
    q, k, v = last_contiguous(q, k, v)
    y = q.new_empty(batch, length, heads, width)
    sums = q.new_empty(batch, heads, length, dtype=torch.float32)
    sizes, scale = sizes_of(q, k)
    _forward_kernel[(triton.cdiv(length, sizes["BM"]), heads, batch)](
        q, k, v, starts, y, sums, length, scale, *q.stride()[:3], *k.stride()[:3],
        *v.stride()[:3], **sizes, **launch_options(False, num_warps=4, num_stages=2),
    )  # fmt: skip
    return y, sums


def attend_backward(
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    ends: Tensor,
    y: Tensor,
    sums: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v in their shapes, laid out as [B, T, heads, P].

    dy is [B, H, T, P]; y and `sums` are what `attend` returned.
    """
    batch, heads, length, width = q.shape
    q, k, v, dy = last_contiguous(q, k, v, dy.to(q.dtype))
    dq = q.new_empty(batch, length, heads, width)
    dk, dv = (q.new_empty(batch, length, k.shape[1], width) for _ in range(2))
    dots = torch.empty_like(sums)
    sizes, scale = sizes_of(q, k)
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *dy.stride()[:3])
    options = launch_options(False, num_warps=4, num_stages=2)
    _query_kernel[(triton.cdiv(length, sizes["BM"]), heads, batch)](
        q, k, v, starts, y, dy, sums, dq, dots, length, scale, *strides, **sizes, **options
    )
    _key_kernel[(triton.cdiv(length, sizes["BN"]), k.shape[1], batch)](
        q, k, v, starts, ends, dy, sums, dots, dk, dv, length, scale, *strides, **sizes, **options
    )
    return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


def last_contiguous(*tensors: Tensor) -> list[Tensor]:
    """The tensors, copied where elements of the last dimension do not lie next to each other."""
    return [t if t.stride(-1) == 1 else t.contiguous() for t in tensors]


def sizes_of(q: Tensor, k: Tensor) -> tuple[dict[str, int], float]:
    """Constants of every kernel, and the scale of scores in powers of two."""
    width, (rows, cols) = q.shape[3], TILES[q.dtype]
    sizes = {"H": q.shape[1], "KH": k.shape[1], "P": width, "BM": rows, "BN": cols}
    sizes["BP"] = max(16, triton.next_power_of_2(width))
    return sizes, LOG2_E.value / math.sqrt(width)
