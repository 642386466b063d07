"""Mamba-2 in a decode pass: convolution, replay, new tokens, skip, gate and norm in one kernel.

A program owns one head of one sequence and keeps its state [N, P] in registers while it walks
from the stored state to the window's last token; see `kernels.window.recurrent`.
"""

import triton
import triton.language as tl
from torch import Tensor

from mambactl.kernels.triton.launch import (
    gdc_launch_dependents,
    gdc_wait,
    launch_options,
    rounded,
)


@triton.jit
def softplus(x):
    """log(1 + exp(x)) without cancellation where it is small."""
    e = tl.exp(-tl.abs(x))
    u = 1.0 + e
    log1p = tl.where(u == 1.0, e, tl.log(u) * (e / (u - 1.0)))
    return tl.maximum(x, 0.0) + log1p


@triton.jit
def silu(x):
    """x sigmoid(x)."""
    return x * tl.sigmoid(x)


@triton.jit
def raw_row(ring, at, width, cols, ok, SLOTS: tl.constexpr):
    """Columns of the ring at position `at` in fp32; zeros before position 0."""
    slot = (at + SLOTS) % SLOTS
    return tl.load(ring + slot * width + cols, mask=ok & (at >= 0), other=0.0).to(tl.float32)


@triton.jit
def tap(weight, cols, ok, i: tl.constexpr):
    """Weights of one of the four taps."""
    return tl.load(weight + cols * 4 + i, mask=ok, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["T", "offset", "scale"])
def _mamba2_kernel(
    ring, z, state, conv_weight, conv_bias, A, D, dt_bias, gain, eps, out, start, count,
    base, base_next, T, offset, scale, width,
    H: tl.constexpr, P: tl.constexpr, N: tl.constexpr, XH: tl.constexpr, BG: tl.constexpr,
    CG: tl.constexpr, SLOTS: tl.constexpr, NORM: tl.constexpr, BP: tl.constexpr,
    BN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    h, b = tl.program_id(0), tl.program_id(1)
    p, n = tl.arange(0, BP), tl.arange(0, BN)
    p_ok, n_ok = p < P, n < N
    x_col = h // (H // XH) * P + p
    # B and C as one row: a row shorter than the program has threads would be held many times over
    both = tl.arange(0, 2 * BN)
    both_ok = both % BN < N
    group = tl.where(both < BN, h // (H // BG), BG + h // (H // CG))
    bc_col = XH * P + group * N + both % BN
    dt_col = XH * P + (BG + CG) * N + h
    if PDL:
        gdc_launch_dependents()
    wx0, wx1 = tap(conv_weight, x_col, p_ok, 0), tap(conv_weight, x_col, p_ok, 1)
    wx2, wx3 = tap(conv_weight, x_col, p_ok, 2), tap(conv_weight, x_col, p_ok, 3)
    wb0, wb1 = tap(conv_weight, bc_col, both_ok, 0), tap(conv_weight, bc_col, both_ok, 1)
    wb2, wb3 = tap(conv_weight, bc_col, both_ok, 2), tap(conv_weight, bc_col, both_ok, 3)
    x_bias = tl.load(conv_bias + x_col, mask=p_ok, other=0.0).to(tl.float32)
    bc_bias = tl.load(conv_bias + bc_col, mask=both_ok, other=0.0).to(tl.float32)
    decay, skip, shift = tl.load(A + h), tl.load(D + h), tl.load(dt_bias + h)
    weight = tl.zeros([BP], tl.float32)
    if NORM:
        weight = tl.load(gain + h * P + p, mask=p_ok, other=0.0).to(tl.float32)
    # where sequences stand does not change within a step
    n_new = tl.load(count + b) * scale
    first, begin = tl.load(base + b), tl.load(start + b) + offset
    end = begin + n_new
    store_at = tl.load(base_next + b)
    if PDL:
        gdc_wait()
    if n_new <= 0:
        return
    ring += b.to(tl.int64) * SLOTS * width
    place = state + ((b * H + h).to(tl.int64) * N + n[:, None]) * P + p[None, :]
    inside = n_ok[:, None] & p_ok[None, :]
    S = tl.load(place, mask=inside, other=0.0)  # [N, P]
    x0 = raw_row(ring, first - 3, width, x_col, p_ok, SLOTS)
    x1 = raw_row(ring, first - 2, width, x_col, p_ok, SLOTS)
    x2 = raw_row(ring, first - 1, width, x_col, p_ok, SLOTS)
    b0 = raw_row(ring, first - 3, width, bc_col, both_ok, SLOTS)
    b1 = raw_row(ring, first - 2, width, bc_col, both_ok, SLOTS)
    b2 = raw_row(ring, first - 1, width, bc_col, both_ok, SLOTS)
    # the next token's row is always on its way
    x3 = raw_row(ring, first, width, x_col, p_ok, SLOTS)
    b3 = raw_row(ring, first, width, bc_col, both_ok, SLOTS)
    dt_raw = raw_row(ring, first, width, dt_col, True, SLOTS)
    z += ((b * T - begin).to(tl.int64) * H + h) * P + p
    gate = tl.load(z + first * H * P, mask=p_ok & (first >= begin), other=0.0)
    for at in range(first, end):
        x4 = raw_row(ring, at + 1, width, x_col, p_ok, SLOTS)
        b4 = raw_row(ring, at + 1, width, bc_col, both_ok, SLOTS)
        dt_next = raw_row(ring, at + 1, width, dt_col, True, SLOTS)
        coming = p_ok & (at + 1 >= begin) & (at + 1 < end)
        gate_next = tl.load(z + (at + 1) * H * P, mask=coming, other=0.0)
        if (at == store_at) & (store_at != first):
            tl.store(place, S, mask=inside)
        x = silu(x0 * wx0 + x1 * wx1 + x2 * wx2 + x3 * wx3 + x_bias)  # [P]
        mixed = silu(b0 * wb0 + b1 * wb1 + b2 * wb2 + b3 * wb3 + bc_bias)  # [2 N]
        key, query = tl.split(tl.trans(tl.reshape(mixed, [2, BN])))  # [N]
        dt = softplus(dt_raw + shift)
        S = tl.fma(S, tl.exp(dt * decay), key[:, None] * (dt * x)[None, :])
        if at >= begin:
            y = tl.sum(S * query[:, None], axis=0) + skip * x  # [P]
            row = ((b * T + at - begin).to(tl.int64) * H + h) * P + p
            y = y * silu(gate.to(tl.float32))
            if NORM:
                y = tl.where(p_ok, y, 0.0)
                y = y * tl.rsqrt(tl.sum(y * y) / P + eps) * weight
            tl.store(out + row, rounded(y, out.dtype.element_ty), mask=p_ok)
        x0, x1, x2, x3, dt_raw = x1, x2, x3, x4, dt_next
        b0, b1, b2, b3, gate = b1, b2, b3, b4, gate_next
    if store_at == end:
        tl.store(place, S, mask=inside)


def mamba2_window(
    ring: Tensor, z: Tensor, state: Tensor, conv_weight: Tensor, conv_bias: Tensor, A: Tensor,
    D: Tensor, dt_bias: Tensor, gain: Tensor | None, eps: float, out: Tensor, start: Tensor,
    count: Tensor, base: Tensor, base_next: Tensor, scale: int, *, T: int, offset: int,
    x_heads: int, b_groups: int, c_groups: int, pdl: bool,
) -> None:  # fmt: skip
    """See `kernels.window.recurrent.mamba2_window`."""
    batch, heads, size, width = state.shape
    blocks = triton.next_power_of_2(width), triton.next_power_of_2(size)
    _mamba2_kernel[(heads, batch)](
        ring, z, state, conv_weight, conv_bias, A, D, dt_bias, A if gain is None else gain, eps,
        out, start, count, base, base_next, T, offset, scale,
        ring.shape[2],
        H=heads, P=width, N=size, XH=x_heads, BG=b_groups, CG=c_groups, SLOTS=ring.shape[1],
        NORM=gain is not None, BP=blocks[0], BN=blocks[1], PDL=pdl,
        **launch_options(pdl, num_warps=8 if blocks[0] * blocks[1] > 8192 else 4),
    )  # fmt: skip


@triton.jit
def _grouped_norm_kernel(y, gain, eps, D, width, BLOCK: tl.constexpr, PDL: tl.constexpr):
    group, m = tl.program_id(0), tl.program_id(1)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    at = tl.arange(0, BLOCK)
    ok = at < width
    place = y + m.to(tl.int64) * D + group * width + at
    value = tl.load(place, mask=ok, other=0.0).to(tl.float32)
    value = value * tl.rsqrt(tl.sum(value * value) / width + eps)
    weight = tl.load(gain + group * width + at, mask=ok, other=0.0).to(tl.float32)
    tl.store(place, rounded(value * weight, y.dtype.element_ty), mask=ok)


def grouped_norm(y: Tensor, gain: Tensor, eps: float, groups: int, *, pdl: bool) -> None:
    """See `kernels.window.recurrent.grouped_norm`."""
    rows, width = y.shape
    _grouped_norm_kernel[(groups, rows)](
        y, gain, eps, width, width // groups,
        BLOCK=triton.next_power_of_2(width // groups), PDL=pdl, **launch_options(pdl, num_warps=8),
    )  # fmt: skip
