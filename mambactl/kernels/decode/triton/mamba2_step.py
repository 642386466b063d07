"""Mamba-2 in a decode pass: replay, new tokens, skip, gate and norm.

A program owns part of one head of one sequence and keeps its state [N, P] in registers while it
walks from the stored state to the segment's last token; see `kernels.decode.reference.recurrent`.
"""

import triton
import triton.language as tl
from torch import Tensor

from mambactl.kernels.launch import gdc_launch_dependents, gdc_wait, launch_options, rounded

# columns of a head's state [N, P] that a program keeps in registers
HEAD_BLOCK = 64


@triton.jit
def softplus(x):
    """log(1 + exp(x)) without cancellation where it is small."""
    e = tl.exp(-tl.abs(x))
    u = 1.0 + e
    log1p = tl.where(u == 1.0, e, tl.log(u) * (e / (u - 1.0)))
    return tl.maximum(x, 0.0) + log1p


@triton.jit
def silu(x):
    """SiLU: x times sigmoid(x)."""
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


@triton.jit
def mamba2_program(
    h, b, piece, ring, mixed, z, state, A, D, dt_bias, gain, eps, out, start, count, base,
    base_next, T, offset, scale, width,
    H: tl.constexpr, P: tl.constexpr, N: tl.constexpr, XH: tl.constexpr, BG: tl.constexpr,
    CG: tl.constexpr, SLOTS: tl.constexpr, NORM: tl.constexpr, BP: tl.constexpr,
    BN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Columns `piece` of head h of sequence b."""
    p, n = piece * BP + tl.arange(0, BP), tl.arange(0, BN)
    p_ok, n_ok = p < P, n < N
    CC: tl.constexpr = XH * P + (BG + CG) * N
    x_col = h // (H // XH) * P + p
    b_col = XH * P + h // (H // BG) * N + n
    c_col = XH * P + BG * N + h // (H // CG) * N + n
    decay, skip, shift = tl.load(A + h), tl.load(D + h), tl.load(dt_bias + h)
    weight = tl.zeros([BP], tl.float32)
    if NORM:
        weight = tl.load(gain + h * P + p, mask=p_ok, other=0.0).to(tl.float32)
    # where sequences stand does not change within a step
    n_new = tl.load(count + b) * scale
    first, begin = tl.load(base + b), tl.load(start + b) + offset
    # a sequence that has ended walks nowhere
    live = n_new > 0
    end = tl.where(live, begin + n_new, first)
    store_at = tl.load(base_next + b)
    if PDL:
        gdc_wait()
    ring += b.to(tl.int64) * SLOTS * width
    mixed += b.to(tl.int64) * SLOTS * CC
    pointer = state + ((b * H + h).to(tl.int64) * N + n[:, None]) * P + p[None, :]
    inside = n_ok[:, None] & p_ok[None, :]
    S = tl.load(pointer, mask=inside, other=0.0)  # [N, P]
    z += (b * T * H + h).to(tl.int64) * P + p
    # the next token's rows are always on their way
    x = raw_row(mixed, first, CC, x_col, p_ok, SLOTS)  # [P]
    key = raw_row(mixed, first, CC, b_col, n_ok, SLOTS)  # [N]
    query = raw_row(mixed, first, CC, c_col, n_ok & (first >= begin), SLOTS)  # [N]
    step = raw_row(ring, first, width, CC + h, True, SLOTS)
    gate = tl.load(z + (first - begin) * H * P, mask=p_ok & (first >= begin), other=0.0)
    for at in range(first, end):
        more, read = at + 1 < end, (at + 1 >= begin) & (at + 1 < end)
        x_next = raw_row(mixed, at + 1, CC, x_col, p_ok & more, SLOTS)
        key_next = raw_row(mixed, at + 1, CC, b_col, n_ok & more, SLOTS)
        query_next = raw_row(mixed, at + 1, CC, c_col, n_ok & read, SLOTS)
        step_next = raw_row(ring, at + 1, width, CC + h, more, SLOTS)
        gate_next = tl.load(z + (at + 1 - begin) * H * P, mask=p_ok & read, other=0.0)
        if (at == store_at) & (store_at != first):
            tl.store(pointer, S, mask=inside)
        dt = softplus(step + shift)
        S = tl.fma(S, tl.exp(dt * decay), key[:, None] * (dt * x)[None, :])
        if at >= begin:
            y = tl.sum(S * query[:, None], axis=0) + skip * x  # [P]
            y = y * silu(gate.to(tl.float32))
            if NORM:
                y = tl.where(p_ok, y, 0.0)
                y = y * tl.rsqrt(tl.sum(y * y) / P + eps) * weight
            row = ((b * T + at - begin).to(tl.int64) * H + h) * P + p
            tl.store(out + row, rounded(y, out.dtype.element_ty), mask=p_ok)
        x, key, query, step, gate = x_next, key_next, query_next, step_next, gate_next
    if live & (store_at == end):
        tl.store(pointer, S, mask=inside)


@triton.jit(do_not_specialize=["T", "offset", "scale"])
def _mamba2_kernel(
    ring, mixed, z, state, A, D, dt_bias, gain, eps, out, start, count, base, base_next, T, offset,
    scale, width,
    H: tl.constexpr, P: tl.constexpr, N: tl.constexpr, XH: tl.constexpr, BG: tl.constexpr,
    CG: tl.constexpr, SLOTS: tl.constexpr, NORM: tl.constexpr, BP: tl.constexpr,
    BN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
    mamba2_program(
        tl.program_id(0), tl.program_id(1), tl.program_id(2), ring, mixed, z, state, A, D, dt_bias,
        gain, eps, out, start, count, base, base_next, T, offset, scale, width, H, P, N, XH, BG,
        CG, SLOTS, NORM, BP, BN, PDL,
    )  # fmt: skip


def mamba2_sizes(
    ring: Tensor, state: Tensor, gain: Tensor | None, x_heads: int, b_groups: int, c_groups: int
) -> tuple[int, dict[str, int]]:
    """Programs for each head, and sizes of `mamba2_program`.

    NORM says whether it norms heads itself: those wider than a program need a kernel of their own.
    """
    _, heads, size, width = state.shape
    block = min(HEAD_BLOCK, triton.next_power_of_2(width))
    sizes = {
        "H": heads, "P": width, "N": size, "XH": x_heads, "BG": b_groups, "CG": c_groups,
        "SLOTS": ring.shape[1], "NORM": gain is not None and width <= block, "BP": block,
        "BN": triton.next_power_of_2(size),
    }  # fmt: skip
    return triton.cdiv(width, block), sizes


def mamba2_segment(
    ring: Tensor, mixed: Tensor, z: Tensor, state: Tensor, A: Tensor, D: Tensor, dt_bias: Tensor,
    gain: Tensor | None, eps: float, out: Tensor, start: Tensor, count: Tensor, base: Tensor,
    base_next: Tensor, scale: int, *, T: int, offset: int, x_heads: int, b_groups: int,
    c_groups: int, pdl: bool,
) -> None:  # fmt: skip
    """Run a segment of Mamba-2; see `kernels.decode.reference.recurrent.mamba2_segment`.

    Heads wider than a program are normed by a kernel of their own.
    """
    batch, heads, _, _ = state.shape
    pieces, sizes = mamba2_sizes(ring, state, gain, x_heads, b_groups, c_groups)
    inside = sizes["NORM"]
    _mamba2_kernel[(heads, batch, pieces)](
        ring, mixed, z, state, A, D, dt_bias, gain if inside else A, eps, out, start, count, base,
        base_next, T, offset, scale, ring.shape[2], PDL=pdl, **sizes,
        **launch_options(pdl, num_warps=4),
    )  # fmt: skip
    if gain is not None and not inside:
        grouped_norm(out, gain, eps, heads, pdl=pdl)


@triton.jit
def _grouped_norm_kernel(y, gain, eps, D, width, BLOCK: tl.constexpr, PDL: tl.constexpr):
    group, m = tl.program_id(0), tl.program_id(1)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    at = tl.arange(0, BLOCK)
    ok = at < width
    pointer = y + m.to(tl.int64) * D + group * width + at
    value = tl.load(pointer, mask=ok, other=0.0).to(tl.float32)
    value = value * tl.rsqrt(tl.sum(value * value) / width + eps)
    weight = tl.load(gain + group * width + at, mask=ok, other=0.0).to(tl.float32)
    tl.store(pointer, rounded(value * weight, y.dtype.element_ty), mask=ok)


def grouped_norm(y: Tensor, gain: Tensor, eps: float, groups: int, *, pdl: bool) -> None:
    """RMS-normalise within groups; see `kernels.decode.reference.recurrent.grouped_norm`."""
    rows, width = y.shape
    _grouped_norm_kernel[(groups, rows)](
        y, gain, eps, width, width // groups,
        BLOCK=triton.next_power_of_2(width // groups), PDL=pdl,
        **launch_options(pdl, num_warps=8 if width // groups > 1024 else 1),
    )  # fmt: skip
