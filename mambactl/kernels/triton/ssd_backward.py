"""Gradients of Mamba-2 (`kernels.triton.ssd`), parallel over chunks and heads, in three launches.

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
heads that share x, B or C, and chunks that share A, leave their parts to a sum of their own.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mambactl.kernels.triton.launch import dot, launch_options, rounded
from mambactl.kernels.triton.ssd import BLOCKS, add_up, block, log_decays, pass_on, split

# three tiles of scores and a tile of gradients are in registers at a time
WARPS = {torch.bfloat16: 8, torch.float32: 4}
MOST = {torch.bfloat16: 64, torch.float32: 32}


class Gradients(NamedTuple):
    """In the types and shapes of the inputs; `initial_state` is fp32."""

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
    x, dt, A, B, C, dy, documents, entering, leaving, dx, ddt, dA, dB, dC, T, chunks, x_b, x_t,
    x_h, dt_b, dt_t, dt_h, k_b, k_t, k_g, q_b, q_t, q_g, y_b, y_t, y_h,
    H: tl.constexpr, P: tl.constexpr, N: tl.constexpr, XH: tl.constexpr, BG: tl.constexpr,
    CG: tl.constexpr, TILE: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr,
    DOCUMENTS: tl.constexpr,
):  # fmt: skip
    h, c, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    at = tl.arange(0, TILE)
    begin = (c * TILE).to(tl.int64)
    ok = begin + at < T
    x += b * x_b + begin * x_t + h // (H // XH) * x_h
    B += b * k_b + begin * k_t + h // (H // BG) * k_g
    C += b * q_b + begin * q_t + h // (H // CG) * q_g
    dy += b * y_b + begin * y_t + h * y_h
    entering += ((b * H + h) * chunks + c) * (P * N)
    leaving += ((b * H + h) * chunks + c) * (P * N)
    first = (b * T + begin) * H + h
    dx += first * P
    dB += first * N
    dC += first * N
    rate = tl.load(A + h)
    step = tl.load(dt + b * dt_b + (begin + at) * dt_t + h * dt_h, mask=ok, other=0.0)  # [L]
    logs, free = log_decays(step, rate, documents + b * T, begin + at, ok, DOCUMENTS)
    decay = tl.cumsum(logs, 0)
    total = tl.sum(logs, 0)
    coarse, fine = split(decay)
    gap = (coarse[:, None] - coarse[None, :]) + (fine[:, None] - fine[None, :])
    weight = tl.where(at[:, None] >= at[None, :], tl.exp(tl.minimum(gap, 0.0)), 0.0)  # [L, S]
    since = tl.exp(tl.minimum(coarse, 0.0))  # [L], from the chunk's start
    until = tl.exp(tl.minimum((total - decay).to(tl.float32), 0.0))  # [S], to its end

    scores = tl.zeros([TILE, TILE], tl.float32)
    for k in tl.static_range(0, N, BN):
        n = k + tl.arange(0, BN)
        scores = dot(_rows(C, q_t, n, N, ok), tl.trans(_rows(B, k_t, n, N, ok)), scores)
    cross = tl.zeros([TILE, TILE], tl.float32)  # dy_t.x_s
    for k in tl.static_range(0, P, BP):
        p = k + tl.arange(0, BP)
        cross = dot(_rows(dy, y_t, p, P, ok), tl.trans(_rows(x, x_t, p, P, ok)), cross)
    flows = scores * weight  # [L, S]
    cross *= weight

    # what passes t: from a token before it to an output from it on
    passing = tl.where(at[:, None] > at[None, :], cross * scores * step[None, :], 0.0)
    before = tl.cumsum(passing, 1) - passing  # [L, t], from tokens before t
    dl = tl.sum(tl.where(at[:, None] >= at[None, :], before, 0.0), 0)  # [t]

    kind: tl.constexpr = x.dtype.element_ty
    turned = tl.trans(rounded(flows, kind))  # [S, L]
    own = tl.zeros([TILE], tl.float32)  # x_s.g_s
    left = tl.zeros([TILE], tl.float32)  # its part through the state that leaves
    for k in tl.static_range(0, P, BP):
        p = k + tl.arange(0, BP)
        acc = tl.zeros([TILE, BP], tl.float32)
        for j in tl.static_range(0, N, BN):
            n = j + tl.arange(0, BN)
            acc = dot(_rows(B, k_t, n, N, ok), tl.trans(_state(leaving, p, n, P, N)), acc)
        acc *= until[:, None]
        value = _rows(x, x_t, p, P, ok).to(tl.float32)
        left += tl.sum(value * acc, 1)
        acc = dot(turned, _rows(dy, y_t, p, P, ok), acc)
        own += tl.sum(value * acc, 1)
        _put(dx, H * P, p, P, ok, acc * step[:, None])

    turned = tl.trans(rounded(cross, kind))  # [S, L]
    taken = rounded(cross * step[None, :], kind)  # [L, S]
    came = tl.zeros([TILE], tl.float32)  # from the state that entered to output t
    through = 0.0  # from the state that entered to the one that leaves
    for k in tl.static_range(0, N, BN):
        n = k + tl.arange(0, BN)
        acc_b = tl.zeros([TILE, BN], tl.float32)
        acc_c = tl.zeros([TILE, BN], tl.float32)
        for j in tl.static_range(0, P, BP):
            p = j + tl.arange(0, BP)
            R = _state(leaving, p, n, P, N)
            S = _state(entering, p, n, P, N)
            acc_b = dot(_rows(x, x_t, p, P, ok), R, acc_b)
            acc_c = dot(_rows(dy, y_t, p, P, ok), S, acc_c)
            through += tl.sum(S.to(tl.float32) * R.to(tl.float32))
        query = _rows(C, q_t, n, N, ok)
        acc_b = dot(turned, query, acc_b * until[:, None])
        _put(dB, H * N, n, N, ok, acc_b * step[:, None])
        acc_c *= since[:, None]
        came += tl.sum(query.to(tl.float32) * acc_c, 1)
        acc_c = dot(taken, _rows(B, k_t, n, N, ok), acc_c)
        _put(dC, H * N, n, N, ok, acc_c)

    left *= step
    dl += tl.cumsum(left, 0) - left
    dl += tl.sum(came, 0) - (tl.cumsum(came, 0) - came)
    dl += through * tl.exp(total.to(tl.float32))
    dl = tl.where(free, dl, 0.0)
    tl.store(ddt + first + at * H, own + dl * rate, mask=ok)
    tl.store(dA + (b * chunks + c) * H + h, tl.sum(dl * step, 0))


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
    fresh, kept = add_up(dy, dt, A, C, documents, entering, sizes | shared, backward=True)
    leaving, d_initial = pass_on(fresh, kept, d_final, kind, backward=True)
    del fresh

    dx = x.new_empty(batch, length, heads, width)
    dB, dC = (x.new_empty(batch, length, heads, size) for _ in range(2))
    ddt = torch.empty(dt.shape, dtype=torch.float32, device=dt.device)
    dA = x.new_empty(batch * chunks, heads, dtype=torch.float32)
    _gradient_kernel[(heads, chunks, batch)](
        x, dt, A, B, C, dy, dt if documents is None else documents, entering, leaving, dx, ddt,
        dA, dB, dC, length, chunks, *x.stride()[:3], *dt.stride(), *B.stride()[:3],
        *C.stride()[:3], *dy.stride()[:3], **sizes, XH=x_heads, BG=B.shape[2], CG=C.shape[2],
        BP=block(width, MOST[kind]), BN=block(size, MOST[kind]), DOCUMENTS=documents is not None,
        **launch_options(False, num_warps=WARPS[kind], num_stages=1),
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
