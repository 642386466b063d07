"""Gradients of Mamba-2 (`kernels.sequence.ssd`), parallel over chunks and heads, in three launches.

With a_t the sum of the log-decays l of a chunk up to token t, S the state that enters the chunk,
R the gradient of the state that leaves it, g_s = sum_{t>=s} e^(a_t-a_s) (C_t.B_s) dy_t
+ e^(a_L-a_s) R B_s:
    dx_s = dt_s g_s                      ddt_s = x_s.g_s + A dl_s              dA = sum dt_s dl_s
    dB_s = dt_s (sum_{t>=s} e^(a_t-a_s) (dy_t.x_s) C_t + e^(a_L-a_s) R^T x_s)
    dC_t = sum_{s<=t} e^(a_t-a_s) dt_s (dy_t.x_s) B_s + e^(a_t) S^T dy_t
    dl_t = what flows past t: from tokens s < t of the chunk, or from S, to outputs r >= t, or to
           the state that leaves
dl is summed from those products alone. As a difference of x.dx and y.dy, which is what
differentiating the sums a would give, it would lose what a token passes to itself. Nothing flows
through the decay of a document's first token. No sum depends on the order in which programs run:
heads that share x and B are summed by one program where a tile holds them, and what else is shared,
as A is by chunks, is left in parts to a sum of its own.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mambactl.kernels.launch import dot, launch_options, rounded
from mambactl.kernels.sequence.ssd import BLOCKS, add_up, block, pass_on

# a row of a tile of 64 tokens then lies in one warp, which sums it without a barrier
WARPS = 4
# tiles of the next head are on their way while one is worked on
STAGES = 2
MOST = {torch.bfloat16: 64, torch.float32: 32}


class Gradients(NamedTuple):
    """Gradients in the types and shapes of the inputs; `initial_state` is fp32."""

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    initial_state: Tensor


@triton.jit
def _rows(ptr, stride, cols, width, ok):
    """Columns of the tokens of a chunk [L, cols]."""
    at = tl.arange(0, ok.shape[0])[:, None] * stride + cols[None, :]
    return tl.load(ptr + at, mask=ok[:, None] & (cols < width)[None, :], other=0.0)


@triton.jit
def _state(ptr, p, n, P: tl.constexpr, N: tl.constexpr):
    """A block [p, n] of a state."""
    inside = (p < P)[:, None] & (n < N)[None, :]
    return tl.load(ptr + p[:, None] * N + n[None, :], mask=inside, other=0.0)


@triton.jit
def _put(ptr, stride, cols, width, ok, value):
    """Store what `_rows` would load."""
    at = tl.arange(0, ok.shape[0])[:, None] * stride + cols[None, :]
    inside = ok[:, None] & (cols < width)[None, :]
    tl.store(ptr + at, rounded(value, ptr.dtype.element_ty), mask=inside)


@triton.jit
def _gradient_kernel(
    x, A, B, C, dy, notes, entering, leaving, dx, ddt, dA, dB, dC, T, chunks, x_b, x_t, x_h, k_b,
    k_t, k_g, q_b, q_t, q_g, y_b, y_t, y_h,
    H: tl.constexpr, P: tl.constexpr, N: tl.constexpr, XH: tl.constexpr, BG: tl.constexpr,
    CG: tl.constexpr, SHARE: tl.constexpr, TILE: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """SHARE heads with one x and one B, whose gradients are summed here.

    The order of what follows keeps few tiles alive: scores, decays and what comes of both first.
    """
    part, c, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    at = tl.arange(0, TILE)
    begin = (c * TILE).to(tl.int64)
    ok = begin + at < T
    x += b * x_b + begin * x_t + part * SHARE // (H // XH) * x_h
    B += b * k_b + begin * k_t + part * SHARE // (H // BG) * k_g
    first = b * T + begin
    dx += (first * (H // SHARE) + part) * P
    dB += (first * (H // SHARE) + part) * N
    kind: tl.constexpr = x.dtype.element_ty
    square = tl.zeros([TILE, TILE], tl.float32)
    sum_x = tl.zeros([TILE, BP], tl.float32)
    sum_b = tl.zeros([TILE, BN], tl.float32)
    for i in range(SHARE):
        h = part * SHARE + i
        query = C + b * q_b + begin * q_t + h // (H // CG) * q_g
        grad = dy + b * y_b + begin * y_t + h * y_h
        cell = (b * H + h) * chunks + c
        came_in, going_out = entering + cell * (P * N), leaving + cell * (P * N)
        note = notes + cell * (4 * TILE)
        coarse, fine = tl.load(note + at), tl.load(note + TILE + at)
        step = tl.load(note + 2 * TILE + at)  # [L]
        gap = (coarse[:, None] - coarse[None, :]) + (fine[:, None] - fine[None, :])
        later = at[:, None] >= at[None, :]
        weight = tl.where(later, tl.exp(tl.minimum(gap, 0.0)), 0.0)  # [L, S]
        scores = square
        for k in tl.static_range(0, N, BN):
            n = k + tl.arange(0, BN)
            key = _rows(B, k_t, n, N, ok)
            scores = dot(_rows(query, q_t, n, N, ok), tl.trans(key), scores)
        cross = square  # dy_t.x_s
        for k in tl.static_range(0, P, BP):
            p = k + tl.arange(0, BP)
            value = _rows(x, x_t, p, P, ok)
            cross = dot(_rows(grad, y_t, p, P, ok), tl.trans(value), cross)
        cross *= weight * step[None, :]
        flows = rounded(scores * weight, kind)  # [L, S]
        taken = rounded(cross, kind)  # [L, S]
        # what goes from token s to output r, and at [r, t] what of it passes t
        passing = tl.where(at[:, None] > at[None, :], cross * scores, 0.0)
        earlier = rounded((at[:, None] < at[None, :]).to(tl.float32), kind)
        before = dot(rounded(passing, kind), earlier, square)

        # a chunk's last token is its end
        whole, rest = tl.load(note + TILE - 1), tl.load(note + 2 * TILE - 1)
        until = tl.exp(tl.minimum((whole - coarse) + (rest - fine), 0.0))  # [S]
        left = tl.zeros([TILE], tl.float32)  # from token s to the state that leaves
        own = tl.zeros([TILE], tl.float32)  # x_s.g_s
        for k in tl.static_range(0, P, BP):
            p = k + tl.arange(0, BP)
            acc = tl.zeros([TILE, BP], tl.float32)
            for j in tl.static_range(0, N, BN):
                n = j + tl.arange(0, BN)
                R = _state(going_out, p, n, P, N)
                acc = dot(_rows(B, k_t, n, N, ok), tl.trans(R), acc)
            acc *= until[:, None]
            value = _rows(x, x_t, p, P, ok).to(tl.float32)
            left += tl.sum(value * acc, 1)
            acc = dot(tl.trans(flows), _rows(grad, y_t, p, P, ok), acc)
            own += tl.sum(value * acc, 1)
            if SHARE > 1:
                sum_x += acc * step[:, None]
            else:
                _put(dx, H * P, p, P, ok, acc * step[:, None])
        through = 0.0  # from the state that entered to the one that leaves
        for k in tl.static_range(0, N, BN):
            n = k + tl.arange(0, BN)
            acc = tl.zeros([TILE, BN], tl.float32)
            for j in tl.static_range(0, P, BP):
                p = j + tl.arange(0, BP)
                R = _state(going_out, p, n, P, N)
                acc = dot(_rows(x, x_t, p, P, ok), R, acc)
                through += tl.sum(_state(came_in, p, n, P, N).to(tl.float32) * R.to(tl.float32))
            acc = acc * (until * step)[:, None] + sum_b
            acc = dot(tl.trans(taken), _rows(query, q_t, n, N, ok), acc)
            if SHARE > 1:
                sum_b = acc
            else:
                _put(dB, H * N, n, N, ok, acc)
        came = tl.zeros([TILE], tl.float32)  # from the state that entered to output t
        since = tl.exp(tl.minimum(coarse, 0.0))  # [L]
        for k in tl.static_range(0, N, BN):
            n = k + tl.arange(0, BN)
            acc = tl.zeros([TILE, BN], tl.float32)
            for j in tl.static_range(0, P, BP):
                p = j + tl.arange(0, BP)
                acc = dot(_rows(grad, y_t, p, P, ok), _state(came_in, p, n, P, N), acc)
            acc *= since[:, None]
            came += tl.sum(_rows(query, q_t, n, N, ok).to(tl.float32) * acc, 1)
            acc = dot(taken, _rows(B, k_t, n, N, ok), acc)
            _put(dC + (first * H + h) * N, H * N, n, N, ok, acc)

        # at [r, t]: to output r from before t; where r is before t, from r to the state that leaves
        passed = tl.where(later, before + came[:, None], (left * step)[:, None])
        dl = tl.sum(passed, 0) + through * tl.exp(tl.minimum(whole, 0.0))
        dl *= tl.load(note + 3 * TILE + at)
        tl.store(ddt + (first + at) * H + h, own + dl * tl.load(A + h), mask=ok)
        tl.store(dA + (b * chunks + c) * H + h, tl.sum(dl * step, 0))
    if SHARE > 1:
        _put(dx, H // SHARE * P, tl.arange(0, BP), P, ok, sum_x)
        _put(dB, H // SHARE * N, tl.arange(0, BN), N, ok, sum_b)


def ssd_backward(
    dy: Tensor,
    d_final: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    documents: Tensor | None,
    entering: Tensor,
) -> Gradients:
    """Gradients of `ssd.scan` for those of y [B, T, H, P] and the final state [B, H, P, N].

    `entering` is what `scan` returned for chunks of one tile; the other arguments are as there.
    """
    (batch, length, heads), (x_heads, width), size = dt.shape, x.shape[2:], B.shape[3]
    kind, tile = x.dtype, BLOCKS[x.dtype].tile
    dy = dy.to(kind)
    x, B, C, dy = (t if t.stride(3) == 1 else t.contiguous() for t in (x, B, C, dy))
    chunks = entering.shape[2]
    sizes = {"H": heads, "P": width, "N": size, "TILE": tile}
    # dy stands where x stood, C where B stood
    shared = {"XH": heads, "BG": C.shape[2], "CHUNK": tile}
    notes = x.new_empty(batch, heads, chunks, 4, tile, dtype=torch.float32)
    fresh, kept = add_up(dy, dt, A, C, documents, notes, sizes | shared, backward=True)
    leaving, d_initial = pass_on(fresh, kept, d_final, kind, backward=True)
    del fresh

    share = 1
    if max(width, size) <= MOST[kind]:
        share = math.gcd(heads // x_heads, heads // B.shape[2])
    dx = x.new_empty(batch, length, heads // share, width)
    dB = x.new_empty(batch, length, heads // share, size)
    dC = x.new_empty(batch, length, heads, size)
    ddt = torch.empty(dt.shape, dtype=torch.float32, device=dt.device)
    dA = x.new_empty(batch * chunks, heads, dtype=torch.float32)
    _gradient_kernel[(heads // share, chunks, batch)](
        x, A, B, C, dy, notes, entering, leaving, dx, ddt, dA, dB, dC, length, chunks,
        *x.stride()[:3], *B.stride()[:3], *C.stride()[:3], *dy.stride()[:3], **sizes, XH=x_heads,
        BG=B.shape[2], CG=C.shape[2], SHARE=share, BP=block(width, MOST[kind]),
        BN=block(size, MOST[kind]), **launch_options(False, num_warps=WARPS, num_stages=STAGES),
    )  # fmt: skip
    dx, dB, dC = (
        _shared(part, groups)
        for part, groups in ((dx, x_heads), (dB, B.shape[2]), (dC, C.shape[2]))
    )
    return Gradients(dx, ddt, dA.sum(0), dB, dC, d_initial)


def _shared(part: Tensor, groups: int) -> Tensor:
    """Sum over the heads [B, T, H, F] that share a group [B, T, G, F]."""
    if part.shape[2] == groups:
        return part
    return part.unflatten(2, (groups, -1)).sum(3)
