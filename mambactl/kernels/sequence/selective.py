"""Mamba-1 over whole prompts (arXiv 2312.00752): a program walks a few channels through time.

The state [channels, N] stays in registers and the rows of the next four tokens are always on
their way: nothing but the state waits for the token before.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from mambactl.kernels.launch import launch_options

CHANNELS = 8
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _rows(x, dt, B, C, ok, n_ok, live):
    """One token's x and dt [Ch], key and query [N] in fp32; zeros if not live: they keep S."""
    return (
        tl.load(x, mask=ok & live, other=0.0).to(tl.float32),
        tl.load(dt, mask=ok & live, other=0.0).to(tl.float32),
        tl.load(B, mask=n_ok & live, other=0.0).to(tl.float32),
        tl.load(C, mask=n_ok & live, other=0.0).to(tl.float32),
    )


@triton.jit
def _advance(S, x, dt, key, query, decay, y, ok):
    """One token: stores its outputs and returns the state [Ch, N]."""
    S = tl.fma(S, tl.exp2(dt[:, None] * decay), (dt * x)[:, None] * key[None, :])
    tl.store(y, tl.sum(S * query[None, :], axis=1), mask=ok)
    return S


@triton.jit
def _scan_kernel(
    x, dt, A, B, C, initial, y, final, T, x_b, x_t, dt_b, dt_t, k_b, k_t, k_g, q_b, q_t, q_g,
    CH: tl.constexpr, N: tl.constexpr, GROUPS: tl.constexpr, BG: tl.constexpr, CG: tl.constexpr,
    BC: tl.constexpr, BN: tl.constexpr, INITIAL: tl.constexpr,
):  # fmt: skip
    per_group: tl.constexpr = CH // GROUPS
    parts: tl.constexpr = tl.cdiv(per_group, BC)
    group, b = tl.program_id(0) // parts, tl.program_id(1).to(tl.int64)
    lane = tl.program_id(0) % parts * BC + tl.arange(0, BC)
    n = tl.arange(0, BN)
    ok, n_ok = lane < per_group, n < N
    ch = group * per_group + lane
    inside = ok[:, None] & n_ok[None, :]
    cell = ch[:, None] * N + n[None, :]
    decay = tl.load(A + cell, mask=inside, other=0.0) * LOG2_E
    S = tl.zeros([BC, BN], tl.float32)
    if INITIAL:
        S = tl.load(initial + b * (CH * N) + cell, mask=inside, other=0.0)
    x += b * x_b + ch
    dt += b * dt_b + ch
    B += b * k_b + group // (GROUPS // BG) * k_g + n
    C += b * q_b + group // (GROUPS // CG) * q_g + n
    y += b * T * CH + ch
    x0, dt0, b0, c0 = _rows(x, dt, B, C, ok, n_ok, True)
    x1, dt1, b1, c1 = _rows(x + x_t, dt + dt_t, B + k_t, C + q_t, ok, n_ok, T > 1)
    x2, dt2, b2, c2 = _rows(x + 2 * x_t, dt + 2 * dt_t, B + 2 * k_t, C + 2 * q_t, ok, n_ok, T > 2)
    x3, dt3, b3, c3 = _rows(x + 3 * x_t, dt + 3 * dt_t, B + 3 * k_t, C + 3 * q_t, ok, n_ok, T > 3)
    for t in range(0, T, 4):
        x, dt, B, C = x + 4 * x_t, dt + 4 * dt_t, B + 4 * k_t, C + 4 * q_t
        S = _advance(S, x0, dt0, b0, c0, decay, y, ok)
        x0, dt0, b0, c0 = _rows(x, dt, B, C, ok, n_ok, t + 4 < T)
        S = _advance(S, x1, dt1, b1, c1, decay, y + CH, ok & (t + 1 < T))
        x1, dt1, b1, c1 = _rows(x + x_t, dt + dt_t, B + k_t, C + q_t, ok, n_ok, t + 5 < T)
        S = _advance(S, x2, dt2, b2, c2, decay, y + 2 * CH, ok & (t + 2 < T))
        x2, dt2, b2, c2 = _rows(
            x + 2 * x_t, dt + 2 * dt_t, B + 2 * k_t, C + 2 * q_t, ok, n_ok, t + 6 < T
        )
        S = _advance(S, x3, dt3, b3, c3, decay, y + 3 * CH, ok & (t + 3 < T))
        x3, dt3, b3, c3 = _rows(
            x + 3 * x_t, dt + 3 * dt_t, B + 3 * k_t, C + 3 * q_t, ok, n_ok, t + 7 < T
        )
        y += 4 * CH
    tl.store(final + b * (CH * N) + cell, S, mask=inside)


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`kernels.reference.selective_scan` without documents.

    x and dt [B, T, Ch], A [Ch, N] fp32, B and C [B, T, G, N] with a G each that divides Ch, any
    strides. Returns y [B, T, Ch] and the final state [B, Ch, N], fp32.
    """
    (batch, length, channels), (key_groups, size) = x.shape, B.shape[2:]
    x, dt, B, C = (t if t.stride(-1) == 1 else t.contiguous() for t in (x, dt, B, C))
    y = x.new_empty(x.shape, dtype=torch.float32)
    final = x.new_empty(batch, channels, size, dtype=torch.float32)
    start = final if initial_state is None else initial_state.float().contiguous()
    # all channels of a program share their key and their query
    groups = math.lcm(key_groups, C.shape[2])
    per_group = channels // groups
    block = min(CHANNELS, triton.next_power_of_2(per_group))
    block_n = triton.next_power_of_2(size)
    warps = min(max(block * block_n // 128, 1), 8)
    _scan_kernel[(groups * triton.cdiv(per_group, block), batch)](
        x, dt, A.contiguous(), B, C, start, y, final, length, *x.stride()[:2], *dt.stride()[:2],
        *B.stride()[:3], *C.stride()[:3], CH=channels, N=size, GROUPS=groups, BG=key_groups,
        CG=C.shape[2], BC=block, BN=block_n, INITIAL=initial_state is not None,
        **launch_options(False, num_warps=warps),
    )  # fmt: skip
    return y, final
