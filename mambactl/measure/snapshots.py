"""Mamba-2 decoding that stores the state after every token, as most decoders roll back.

Written only to be measured against `kernels.triton.mamba2`, which replays accepted tokens instead:
same arithmetic, layout and launch, so what differs is the traffic of states.
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
from mambactl.kernels.triton.mamba2 import raw_row, silu, softplus, tap


@triton.jit(do_not_specialize=["T"])
def _snapshot_kernel(
    ring, z, states, conv_weight, conv_bias, A, D, dt_bias, gain, eps, out, start, slot, T, width,
    H: tl.constexpr, P: tl.constexpr, N: tl.constexpr, XH: tl.constexpr, BG: tl.constexpr,
    CG: tl.constexpr, SLOTS: tl.constexpr, NORM: tl.constexpr, BP: tl.constexpr,
    BN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    h, b = tl.program_id(0), tl.program_id(1)
    p, n = tl.arange(0, BP), tl.arange(0, BN)
    p_ok, n_ok = p < P, n < N
    both = tl.arange(0, 2 * BN)
    both_ok = both % BN < N
    group = tl.where(both < BN, h // (H // BG), BG + h // (H // CG))
    x_col = h // (H // XH) * P + p
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
    if PDL:
        gdc_wait()
    begin = tl.load(start + b)
    ring += b.to(tl.int64) * SLOTS * width
    token = H * N * P  # numbers in one state
    place = states + b.to(tl.int64) * T * token + (h * N + n[:, None]) * P + p[None, :]
    inside = n_ok[:, None] & p_ok[None, :]
    S = tl.load(place + tl.load(slot + b).to(tl.int64) * token, mask=inside, other=0.0)  # [N, P]
    x0 = raw_row(ring, begin - 3, width, x_col, p_ok, SLOTS)
    x1 = raw_row(ring, begin - 2, width, x_col, p_ok, SLOTS)
    x2 = raw_row(ring, begin - 1, width, x_col, p_ok, SLOTS)
    b0 = raw_row(ring, begin - 3, width, bc_col, both_ok, SLOTS)
    b1 = raw_row(ring, begin - 2, width, bc_col, both_ok, SLOTS)
    b2 = raw_row(ring, begin - 1, width, bc_col, both_ok, SLOTS)
    x3 = raw_row(ring, begin, width, x_col, p_ok, SLOTS)
    b3 = raw_row(ring, begin, width, bc_col, both_ok, SLOTS)
    dt_raw = raw_row(ring, begin, width, dt_col, True, SLOTS)
    for at in range(begin, begin + T):
        # on its way while this token is worked on, as in the kernel it is compared with
        x4 = raw_row(ring, at + 1, width, x_col, p_ok, SLOTS)
        b4 = raw_row(ring, at + 1, width, bc_col, both_ok, SLOTS)
        dt_next = raw_row(ring, at + 1, width, dt_col, True, SLOTS)
        x = silu(x0 * wx0 + x1 * wx1 + x2 * wx2 + x3 * wx3 + x_bias)  # [P]
        mixed = silu(b0 * wb0 + b1 * wb1 + b2 * wb2 + b3 * wb3 + bc_bias)  # [2 N]
        key, query = tl.split(tl.trans(tl.reshape(mixed, [2, BN])))  # [N]
        dt = softplus(dt_raw + shift)
        S = tl.fma(S, tl.exp(dt * decay), key[:, None] * (dt * x)[None, :])
        tl.store(place + (at - begin).to(tl.int64) * token, S, mask=inside)
        y = tl.sum(S * query[:, None], axis=0) + skip * x  # [P]
        row = ((b * T + at - begin).to(tl.int64) * H + h) * P + p
        y = y * silu(tl.load(z + row, mask=p_ok, other=0.0).to(tl.float32))
        if NORM:
            y = tl.where(p_ok, y, 0.0)
            y = y * tl.rsqrt(tl.sum(y * y) / P + eps) * weight
        tl.store(out + row, rounded(y, out.dtype.element_ty), mask=p_ok)
        x0, x1, x2, x3, dt_raw = x1, x2, x3, x4, dt_next
        b0, b1, b2, b3 = b1, b2, b3, b4


def snapshot_window(
    ring: Tensor, z: Tensor, states: Tensor, conv_weight: Tensor, conv_bias: Tensor, A: Tensor,
    D: Tensor, dt_bias: Tensor, gain: Tensor | None, eps: float, out: Tensor, start: Tensor,
    slot: Tensor, *, x_heads: int, b_groups: int, c_groups: int, pdl: bool,
) -> None:  # fmt: skip
    """`kernels.window.recurrent.mamba2_window` for T tokens of every sequence, without a replay.

    states [B, T, H, N, P] fp32 is the state after each token of a window; this one begins with
    `slot` [B] of the window before.
    """
    batch, T, heads, size, width = states.shape
    blocks = triton.next_power_of_2(width), triton.next_power_of_2(size)
    _snapshot_kernel[(heads, batch)](
        ring, z, states, conv_weight, conv_bias, A, D, dt_bias, A if gain is None else gain, eps,
        out, start, slot, T, ring.shape[2],
        H=heads, P=width, N=size, XH=x_heads, BG=b_groups, CG=c_groups, SLOTS=ring.shape[1],
        NORM=gain is not None, BP=blocks[0], BN=blocks[1], PDL=pdl,
        **launch_options(pdl, num_warps=8 if blocks[0] * blocks[1] > 8192 else 4),
    )  # fmt: skip
