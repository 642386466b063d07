"""Mamba-2 decoding that stores the state after every token, as most decoders roll back.

Written only to be measured against `kernels.decode.triton.mamba2_step`, which replays accepted
tokens instead: same arithmetic, layout and launch, so what differs is the traffic of states.
"""

import triton
import triton.language as tl
from torch import Tensor

from mambactl.kernels.decode.triton.mamba2_step import (
    HEAD_BLOCK,
    grouped_norm,
    raw_row,
    silu,
    softplus,
)
from mambactl.kernels.launch import gdc_launch_dependents, gdc_wait, launch_options, rounded


@triton.jit(do_not_specialize=["T"])
def _snapshot_kernel(
    ring, mixed, z, states, A, D, dt_bias, out, start, slot, T, width,
    H: tl.constexpr, P: tl.constexpr, N: tl.constexpr, XH: tl.constexpr, BG: tl.constexpr,
    CG: tl.constexpr, SLOTS: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    h, b = tl.program_id(0), tl.program_id(1)
    p, n = tl.program_id(2) * BP + tl.arange(0, BP), tl.arange(0, BN)
    p_ok, n_ok = p < P, n < N
    CC: tl.constexpr = XH * P + (BG + CG) * N
    x_col = h // (H // XH) * P + p
    b_col = XH * P + h // (H // BG) * N + n
    c_col = XH * P + BG * N + h // (H // CG) * N + n
    if PDL:
        gdc_launch_dependents()
    decay, skip, shift = tl.load(A + h), tl.load(D + h), tl.load(dt_bias + h)
    begin, first = tl.load(start + b), tl.load(slot + b)
    end = begin + T
    if PDL:
        gdc_wait()
    ring += b.to(tl.int64) * SLOTS * width
    mixed += b.to(tl.int64) * SLOTS * CC
    token = H * N * P  # numbers in one state
    pointer = states + b.to(tl.int64) * T * token + (h * N + n[:, None]) * P + p[None, :]
    inside = n_ok[:, None] & p_ok[None, :]
    S = tl.load(pointer + first.to(tl.int64) * token, mask=inside, other=0.0)  # [N, P]
    z += (b * T * H + h).to(tl.int64) * P + p
    x = raw_row(mixed, begin, CC, x_col, p_ok, SLOTS)  # [P]
    key = raw_row(mixed, begin, CC, b_col, n_ok, SLOTS)  # [N]
    query = raw_row(mixed, begin, CC, c_col, n_ok, SLOTS)  # [N]
    step = raw_row(ring, begin, width, CC + h, True, SLOTS)
    gate = tl.load(z, mask=p_ok, other=0.0)
    for at in range(begin, end):
        # on its way while this token is worked on, as in the kernel it is compared with
        more = at + 1 < end
        x_next = raw_row(mixed, at + 1, CC, x_col, p_ok & more, SLOTS)
        key_next = raw_row(mixed, at + 1, CC, b_col, n_ok & more, SLOTS)
        query_next = raw_row(mixed, at + 1, CC, c_col, n_ok & more, SLOTS)
        step_next = raw_row(ring, at + 1, width, CC + h, more, SLOTS)
        gate_next = tl.load(z + (at + 1 - begin) * H * P, mask=p_ok & more, other=0.0)
        dt = softplus(step + shift)
        S = tl.fma(S, tl.exp(dt * decay), key[:, None] * (dt * x)[None, :])
        tl.store(pointer + (at - begin).to(tl.int64) * token, S, mask=inside)
        y = tl.sum(S * query[:, None], axis=0) + skip * x  # [P]
        row = ((b * T + at - begin).to(tl.int64) * H + h) * P + p
        tl.store(out + row, rounded(y * silu(gate.to(tl.float32)), out.dtype.element_ty), mask=p_ok)
        x, key, query, step, gate = x_next, key_next, query_next, step_next, gate_next


def snapshot_segment(
    ring: Tensor, mixed: Tensor, z: Tensor, states: Tensor, A: Tensor, D: Tensor, dt_bias: Tensor,
    gain: Tensor | None, eps: float, out: Tensor, start: Tensor, slot: Tensor, *, x_heads: int,
    b_groups: int, c_groups: int, pdl: bool,
) -> None:  # fmt: skip
    """`kernels.decode.reference.recurrent.mamba2_segment` of T tokens a sequence without a replay.

    states [B, T, H, N, P] fp32 is the state after each token of a segment; this one begins with
    `slot` [B] of the segment before.
    """
    batch, T, heads, size, width = states.shape
    block = min(HEAD_BLOCK, triton.next_power_of_2(width))
    _snapshot_kernel[(heads, batch, triton.cdiv(width, block))](
        ring, mixed, z, states, A, D, dt_bias, out, start, slot, T, ring.shape[2], H=heads,
        P=width, N=size, XH=x_heads, BG=b_groups, CG=c_groups, SLOTS=ring.shape[1], BP=block,
        BN=triton.next_power_of_2(size), PDL=pdl, **launch_options(pdl, num_warps=4),
    )  # fmt: skip
    if gain is not None:
        grouped_norm(out, gain, eps, heads, pdl=pdl)
