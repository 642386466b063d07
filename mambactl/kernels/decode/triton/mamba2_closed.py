"""Mamba-2 in a decode pass of many sequences: all its tokens at once, on tensor cores.

The token-by-token work of `kernels.decode.triton.mamba2_step` in the closed form of a chunk (arXiv
2405.21060, section 6): with c the running sum of dt A since the stored state S, and d the skip,
    y_t = exp(c_t) C_t S + sum_{s <= t} (exp(c_t - c_s) dt_s (C_t . B_s) + [s = t] d) x_s.
The state is read once and written only where it is to be stored. fp32 operands enter a product as
the sum of two bf16 numbers, so a product is off by 2^-17 of its operand; how tokens are cut into
segments changes such roundings, which the token by token kernel rules out.
"""

import triton
import triton.language as tl
from torch import Tensor

from mambactl.kernels.decode.triton.mamba2_step import grouped_norm, silu, softplus
from mambactl.kernels.launch import dot, gdc_launch_dependents, gdc_wait, launch_options, rounded

# rows of the narrowest tensor core product, and so the longest segment
MOST_TOKENS = 16
# columns of a head's state [N, P] that a program reads, rows it reads at a time and how far ahead
HEAD_BLOCK, STATE_BLOCK, STAGES = 128, 32, 3
# programs up to which they need more warps each to fill an H200
FEW_PROGRAMS = 512
# exp of this is 0 in fp32, and a sum of any number of them is finite
FORGETS_ALL = tl.constexpr(-1e4)


@triton.jit
def _dot_left(a, b, acc):
    """acc + a b for fp32 a and bf16 b."""
    high = rounded(a, b.dtype)
    return dot(rounded(a - high.to(tl.float32), b.dtype), b, dot(high, b, acc))


@triton.jit
def _dot_right(a, b, acc):
    """acc + a b for bf16 a and fp32 b."""
    high = rounded(b, a.dtype)
    return dot(a, rounded(b - high.to(tl.float32), a.dtype), dot(a, high, acc))


@triton.jit
def _rows(ring, at, width, cols, ok, SLOTS: tl.constexpr):
    """Columns [rows, cols] of a ring at positions `at`."""
    element = (at + SLOTS) % SLOTS * width
    return tl.load(ring + element[:, None] + cols[None, :], mask=ok, other=0.0)


@triton.jit
def closed_program(
    h, b, piece, ring, mixed, z, state, A, D, dt_bias, gain, eps, out, start, count, base,
    base_next, T, offset, scale, width,
    H: tl.constexpr, P: tl.constexpr, N: tl.constexpr, XH: tl.constexpr, BG: tl.constexpr,
    CG: tl.constexpr, SLOTS: tl.constexpr, NORM: tl.constexpr, LEN: tl.constexpr,
    ROWS: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Columns `piece` of head h of sequence b."""
    p, n = piece * BP + tl.arange(0, BP), tl.arange(0, BN)
    p_ok = p < P
    CC: tl.constexpr = XH * P + (BG + CG) * N
    decay, skip, shift = tl.load(A + h), tl.load(D + h), tl.load(dt_bias + h)
    # where sequences stand does not change within a step
    n_new = tl.load(count + b) * scale
    first, begin = tl.load(base + b), tl.load(start + b) + offset
    store_at = tl.load(base_next + b)
    if PDL:
        gdc_wait()
    state += (b * H + h).to(tl.int64) * N * P
    ring += b.to(tl.int64) * SLOTS * width
    mixed += b.to(tl.int64) * SLOTS * CC
    keys = mixed + XH * P + h // (H // BG) * N
    queries = mixed + XH * P + BG * N + h // (H // CG) * N
    j, r = tl.arange(0, LEN), tl.arange(0, ROWS)
    # of a sequence that has ended nothing is real
    live = n_new > 0
    real = (first + j < begin + n_new) & (first + j >= 0) & live
    back = begin - first + r  # index of each row among the tokens since the stored state
    row_ok = (r < n_new) & (back >= 0)
    dt = tl.load(ring + (first + j + SLOTS) % SLOTS * width + CC + h, mask=real, other=0.0)
    value = _rows(mixed, first + j, CC, h // (H // XH) * P + p,
                  real[:, None] & p_ok[None, :], SLOTS)  # fmt: skip

    scores = tl.zeros([ROWS, LEN], tl.float32)
    y = tl.zeros([ROWS, BP], tl.float32)
    for k in tl.range(0, N, BN, num_stages=STAGES):
        n_ok = k + n < N
        query = _rows(queries, begin + r, CC, k + n, row_ok[:, None] & n_ok[None, :], SLOTS)
        key = _rows(keys, first + j, CC, k + n, real[:, None] & n_ok[None, :], SLOTS)
        S = tl.load(
            state + (k + n)[:, None] * P + p[None, :],
            mask=n_ok[:, None] & p_ok[None, :],
            other=0.0,
        )  # [N, P]
        scores = dot(query, tl.trans(key), scores)
        y = _dot_right(query, S, y)

    dt = tl.where(real, softplus(dt.to(tl.float32) + shift), 0.0)  # [L]
    # fp64: after a token that forgets all, differences of sums must stay exact
    logs = tl.maximum(dt * decay, FORGETS_ALL).to(tl.float64)
    upto = tl.cumsum(logs, 0)  # [L]
    seen = j[None, :] <= back[:, None]  # [T, L]
    row_upto = tl.sum(tl.where(seen, logs[None, :], 0.0), axis=1)  # [T]
    gap = tl.minimum((row_upto[:, None] - upto[None, :]).to(tl.float32), 0.0)
    scores = tl.where(seen, scores * tl.exp(gap) * dt[None, :], 0.0)
    scores += tl.where(j[None, :] == back[:, None], skip, 0.0)
    y *= tl.exp(tl.minimum(row_upto.to(tl.float32), 0.0))[:, None]
    y = _dot_left(scores, value, y)  # [T, P]
    lines = (b * T + r).to(tl.int64) * H + h
    line = lines[:, None] * P + p[None, :]
    ok = row_ok[:, None] & p_ok[None, :]
    y *= silu(tl.load(z + line, mask=ok, other=0.0).to(tl.float32))
    if NORM:
        weight = tl.load(gain + h * P + p, mask=p_ok, other=0.0).to(tl.float32)
        y = tl.where(ok, y, 0.0)
        y = y * tl.rsqrt(tl.sum(y * y, axis=1) / P + eps)[:, None] * weight[None, :]
    tl.store(out + line, rounded(y, out.dtype.element_ty), mask=ok)

    if live & (store_at != first) & (store_at <= begin + n_new):
        kept = first + j < store_at
        total = tl.sum(tl.where(kept, logs, 0.0), axis=0)
        share = tl.exp(tl.minimum((total - upto).to(tl.float32), 0.0)) * dt
        share = tl.where(kept, share, 0.0)
        # read again: kept in registers, they would leave too few programs on a multiprocessor
        for k in tl.range(0, N, BN, num_stages=1):
            n_ok = k + n < N
            key = _rows(keys, first + j, CC, k + n, real[:, None] & n_ok[None, :], SLOTS)
            inside = n_ok[:, None] & p_ok[None, :]
            pointer = state + (k + n)[:, None] * P + p[None, :]
            S = tl.load(pointer, mask=inside, other=0.0) * tl.exp(total.to(tl.float32))
            S = _dot_left(tl.trans(key.to(tl.float32) * share[:, None]), value, S)
            tl.store(pointer, S, mask=inside)


@triton.jit(do_not_specialize=["T", "offset", "scale"])
def _closed_kernel(
    ring, mixed, z, state, A, D, dt_bias, gain, eps, out, start, count, base, base_next, T, offset,
    scale, width,
    H: tl.constexpr, P: tl.constexpr, N: tl.constexpr, XH: tl.constexpr, BG: tl.constexpr,
    CG: tl.constexpr, SLOTS: tl.constexpr, NORM: tl.constexpr, LEN: tl.constexpr,
    ROWS: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
    closed_program(
        tl.program_id(0), tl.program_id(1), tl.program_id(2), ring, mixed, z, state, A, D, dt_bias,
        gain, eps, out, start, count, base, base_next, T, offset, scale, width, H, P, N, XH, BG,
        CG, SLOTS, NORM, LEN, ROWS, BP, BN, STAGES, PDL,
    )  # fmt: skip


def closed_sizes(
    ring: Tensor, state: Tensor, gain: Tensor | None, x_heads: int, b_groups: int, c_groups: int
) -> tuple[int, int, dict[str, int]]:
    """Programs for each head, warps of each, and sizes of `closed_program`.

    NORM says whether it norms heads itself: those wider than a program need a kernel of their own.
    """
    batch, heads, size, width = state.shape
    block = max(16, min(HEAD_BLOCK, triton.next_power_of_2(width)))
    warps = 8 if heads * batch <= FEW_PROGRAMS and block > 64 else 4
    sizes = {
        "H": heads, "P": width, "N": size, "XH": x_heads, "BG": b_groups, "CG": c_groups,
        "SLOTS": ring.shape[1], "NORM": gain is not None and width <= block,
        "LEN": max(16, ring.shape[1]), "ROWS": MOST_TOKENS, "BP": block,
        "BN": max(16, min(STATE_BLOCK, triton.next_power_of_2(size))), "STAGES": STAGES,
    }  # fmt: skip
    return triton.cdiv(width, block), warps, sizes


def mamba2_closed(
    ring: Tensor, mixed: Tensor, z: Tensor, state: Tensor, A: Tensor, D: Tensor, dt_bias: Tensor,
    gain: Tensor | None, eps: float, out: Tensor, start: Tensor, count: Tensor, base: Tensor,
    base_next: Tensor, scale: int, *, T: int, offset: int, x_heads: int, b_groups: int,
    c_groups: int, pdl: bool,
) -> None:  # fmt: skip
    """See `kernels.decode.reference.recurrent.mamba2_segment`: bf16, at most MOST_TOKENS tokens."""
    batch, heads, _, _ = state.shape
    pieces, warps, sizes = closed_sizes(ring, state, gain, x_heads, b_groups, c_groups)
    inside = sizes["NORM"]
    _closed_kernel[(heads, batch, pieces)](
        ring, mixed, z, state, A, D, dt_bias, gain if inside else A, eps, out, start, count, base,
        base_next, T, offset, scale, ring.shape[2], PDL=pdl, **sizes,
        **launch_options(pdl, num_warps=warps),
    )  # fmt: skip
    if gain is not None and not inside:
        grouped_norm(out, gain, eps, heads, pdl=pdl)
