"""Mamba-1 in a decode pass: x_proj of the convolved segment, then dt_proj, replay, scan and gate.

See `kernels.decode.reference.recurrent`. The scan takes sixteen positions at a time, because the
step sizes of that many come out of one small matrix product, and walks through them one by one.
"""

import triton
import triton.language as tl
from torch import Tensor

from mambactl.kernels.decode.triton.mamba2_step import raw_row, silu, softplus, tap
from mambactl.kernels.launch import dot, gdc_launch_dependents, gdc_wait, launch_options, rounded

SIXTEEN = tl.constexpr(16)
# channels and warps of a scan's program, for few sequences and for many
SCAN, WIDE_SCAN = (32, 4), (64, 4)


@triton.jit
def _low_row(mixed, w_tile, start, offset, m, M, T, k, CH: tl.constexpr, SLOTS: tl.constexpr):
    at = tl.load(start + m // T, mask=m < M, other=0) + offset + m % T
    row = (m // T * SLOTS + (at + SLOTS) % SLOTS).to(tl.int64) * CH
    x = tl.load(mixed + row + k, mask=(k < CH) & (m < M), other=0.0).to(tl.float32)
    return tl.sum(w_tile.to(tl.float32) * x[None, :], axis=1)


@triton.jit(do_not_specialize=["M", "T", "offset", "scale"])
def _low_kernel(
    mixed, w, low, start, count, M, T, offset, scale, J,
    CH: tl.constexpr, SLOTS: tl.constexpr, ROWS: tl.constexpr, BJ: tl.constexpr, BK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    j = tl.program_id(0) * BJ + tl.arange(0, BJ)
    k = tl.arange(0, BK)
    if PDL:
        gdc_launch_dependents()
    # all of K stays in registers, on its way before the rows are there
    w_tile = tl.load(
        w + j[:, None] * CH + k[None, :], mask=(j < J)[:, None] & (k < CH)[None, :], other=0.0
    )
    if PDL:
        gdc_wait()
    for m in range(0, M, ROWS):
        # several rows at a time, so that they wait for memory together
        y0 = _low_row(mixed, w_tile, start, offset, m, M, T, k, CH, SLOTS)
        y = y0[:, None]
        if ROWS == 4:
            y1 = _low_row(mixed, w_tile, start, offset, m + 1, M, T, k, CH, SLOTS)
            y2 = _low_row(mixed, w_tile, start, offset, m + 2, M, T, k, CH, SLOTS)
            y3 = _low_row(mixed, w_tile, start, offset, m + 3, M, T, k, CH, SLOTS)
            y = tl.reshape(tl.join(tl.join(y0, y2), tl.join(y1, y3)), [BJ, 4])
        row = m + tl.arange(0, ROWS)
        b, t = row // T, row % T
        at = tl.load(start + b, mask=row < M, other=0) + offset + t
        kept = (t < tl.load(count + b, mask=row < M, other=0) * scale) & (at >= 0)
        slot = (b * SLOTS + (at + SLOTS) % SLOTS).to(tl.int64) * J
        ok = (j < J)[:, None] & (kept & (row < M))[None, :]
        tl.store(low + slot[None, :] + j[:, None], rounded(y, low.dtype.element_ty), mask=ok)


@triton.jit
def _row_of(tile, which):
    """Row `which` of a tile of sixteen rows."""
    rows = tl.arange(0, SIXTEEN)[:, None]
    return tl.sum(tl.where(rows == which, tile, 0.0), axis=0)


@triton.jit
def _low_tile(low, first, last, width, cols, ok, SLOTS: tl.constexpr):
    """Columns of sixteen positions from `first` on, [16, cols]; zeros from `last` on."""
    at = first + tl.arange(0, SIXTEEN)
    rows = ((at + SLOTS) % SLOTS * width)[:, None]
    return tl.load(low + rows + cols[None, :], mask=((at >= 0) & (at < last))[:, None]
                   & ok[None, :], other=0.0)  # fmt: skip


@triton.jit(do_not_specialize=["T", "offset", "scale"])
def _mamba1_kernel(
    ring, mixed, low, z, state, conv_weight, conv_bias, dt_weight, dt_bias, A, D, out, start, count,
    base, base_next, T, offset, scale, ring_width, low_width, dt_col, b_start, c_start,
    CH: tl.constexpr, N: tl.constexpr, RANK: tl.constexpr, PIECE: tl.constexpr,
    REPEAT: tl.constexpr, SLOTS: tl.constexpr, NATIVE: tl.constexpr, BD: tl.constexpr,
    BN: tl.constexpr, BR: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1)
    d = tl.program_id(0) * BD + tl.arange(0, BD)
    n, r = tl.arange(0, BN), tl.arange(0, BR)
    d_ok, n_ok = d < CH, n < N
    inside = d_ok[:, None] & n_ok[None, :]
    source = d // (PIECE * REPEAT) * PIECE + d % PIECE
    group = (d // N * N)[:, None] + n[None, :]  # [D, N] channel that holds B and C of this pair
    b_cols = b_start + group // (PIECE * REPEAT) * PIECE + group % PIECE
    c_cols = c_start + group
    if PDL:
        gdc_launch_dependents()
    w_dt = tl.load(dt_weight + d[:, None] * RANK + r[None, :],
                   mask=d_ok[:, None] & (r < RANK)[None, :], other=0.0)  # fmt: skip
    if not NATIVE:
        w0, w1 = tap(conv_weight, d, d_ok, 0), tap(conv_weight, d, d_ok, 1)
        w2, w3 = tap(conv_weight, d, d_ok, 2), tap(conv_weight, d, d_ok, 3)
        bias = tl.load(conv_bias + d, mask=d_ok, other=0.0).to(tl.float32)
    shift = tl.load(dt_bias + d, mask=d_ok, other=0.0).to(tl.float32)
    skip = tl.load(D + d, mask=d_ok, other=0.0)
    decay = tl.load(A + d[:, None] * N + n[None, :], mask=inside, other=0.0)
    # where sequences stand does not change within a step
    n_new = tl.load(count + b) * scale
    first, begin = tl.load(base + b), tl.load(start + b) + offset
    end = begin + n_new
    store_at = tl.load(base_next + b)
    if PDL:
        gdc_wait()
    if n_new <= 0:
        return
    ring += b.to(tl.int64) * SLOTS * ring_width
    low += b.to(tl.int64) * SLOTS * low_width
    pointer = state + (b * CH + d[:, None]).to(tl.int64) * N + n[None, :]
    S = tl.load(pointer, mask=inside, other=0.0)  # [D, N]
    # the next token's x is always on its way: convolved already, or its raw row
    if NATIVE:
        mixed += b.to(tl.int64) * SLOTS * CH
        x3 = raw_row(mixed, first, CH, d, d_ok, SLOTS)
    else:
        x0 = raw_row(ring, first - 3, ring_width, source, d_ok, SLOTS)
        x1 = raw_row(ring, first - 2, ring_width, source, d_ok, SLOTS)
        x2 = raw_row(ring, first - 1, ring_width, source, d_ok, SLOTS)
        x3 = raw_row(ring, first, ring_width, source, d_ok, SLOTS)
    z += (b * T).to(tl.int64) * CH + d
    gate = tl.load(z + (first - begin) * CH, mask=d_ok & (first >= begin), other=0.0)
    for tile in range(first, end, 16):
        step_low = _low_tile(low, tile, end, low_width, dt_col + r, r < RANK, SLOTS)
        steps = dot(step_low.to(w_dt.dtype), tl.trans(w_dt), tl.zeros([SIXTEEN, BD], tl.float32))
        steps = softplus(steps + shift[None, :])  # [16, D]
        if NATIVE:
            keys = _low_tile(low, tile, end, low_width, b_start + n, n_ok, SLOTS).to(tl.float32)
            queries = _low_tile(low, tile, end, low_width, c_start + n, n_ok, SLOTS).to(tl.float32)
        for at in range(tile, tl.minimum(tile + 16, end)):
            more = d_ok & (at + 1 < end)
            if NATIVE:
                x, x4 = x3, raw_row(mixed, at + 1, CH, d, more, SLOTS)
            else:
                x4 = raw_row(ring, at + 1, ring_width, source, more, SLOTS)
                x = silu(x0 * w0 + x1 * w1 + x2 * w2 + x3 * w3 + bias)  # [D]
                x0, x1, x2 = x1, x2, x3
            coming = d_ok & (at + 1 >= begin) & (at + 1 < end)
            gate_next = tl.load(z + (at + 1 - begin) * CH, mask=coming, other=0.0)
            if (at == store_at) & (store_at != first):
                tl.store(pointer, S, mask=inside)
            dt = _row_of(steps, at - tile)
            if NATIVE:
                key = _row_of(keys, at - tile)[None, :]
            else:
                key = raw_row(ring, at, ring_width, b_cols, inside, SLOTS)  # [D, N]
            S = tl.fma(S, tl.exp(dt[:, None] * decay), (dt * x)[:, None] * key)
            if at >= begin:
                if NATIVE:
                    query = _row_of(queries, at - tile)[None, :]
                else:
                    query = raw_row(ring, at, ring_width, c_cols, inside, SLOTS)
                y = tl.sum(S * query, axis=1) + skip * x  # [D]
                row = (b * T + at - begin).to(tl.int64) * CH + d
                y = y * silu(gate.to(tl.float32))
                tl.store(out + row, rounded(y, out.dtype.element_ty), mask=d_ok)
            x3, gate = x4, gate_next
    if store_at == end:
        tl.store(pointer, S, mask=inside)


def mamba1_low(
    mixed: Tensor, w: Tensor, low: Tensor, start: Tensor, count: Tensor, scale: int, *, T: int,
    offset: int, pdl: bool,
) -> None:  # fmt: skip
    """See `kernels.decode.reference.recurrent.mamba1_low`; for few rows, one after the other."""
    (batch, slots, channels), J = mixed.shape, len(w)
    M = batch * T
    large = channels > 2048
    block = 2 if large else 1
    _low_kernel[(triton.cdiv(J, block),)](
        mixed, w, low, start, count, M, T, offset, scale, J, CH=channels, SLOTS=slots,
        ROWS=1 if M <= 2 else 4, BJ=block, BK=triton.next_power_of_2(channels), PDL=pdl,
        **launch_options(pdl, num_warps=8 if large else 4),
    )  # fmt: skip


def mamba1_segment(
    ring: Tensor, mixed: Tensor | None, low: Tensor | None, z: Tensor, state: Tensor,
    conv_weight: Tensor, conv_bias: Tensor, dt_weight: Tensor, dt_bias: Tensor, A: Tensor,
    D: Tensor, out: Tensor, start: Tensor, count: Tensor, base: Tensor, base_next: Tensor,
    scale: int, *, T: int, offset: int, piece: int, repeat: int, pdl: bool,
) -> None:  # fmt: skip
    """Run a segment of Mamba-1; see `kernels.decode.reference.recurrent.mamba1_segment`."""
    batch, channels, size = state.shape
    rank, n_x = dt_weight.shape[1], channels // repeat
    if low is None:
        source, dt_col, b_start, c_start = ring, 2 * n_x + channels, n_x, 2 * n_x
    else:
        source, dt_col, b_start, c_start = low, 0, rank, rank + size
    block, warps = SCAN if batch <= 4 else WIDE_SCAN
    _mamba1_kernel[(triton.cdiv(channels, block), batch)](
        ring, ring if mixed is None else mixed, source, z, state, conv_weight, conv_bias,
        dt_weight, dt_bias, A, D, out, start, count, base, base_next, T, offset, scale,
        ring.shape[2], source.shape[2], dt_col, b_start, c_start, CH=channels, N=size, RANK=rank,
        PIECE=piece, REPEAT=repeat, SLOTS=ring.shape[1], NATIVE=low is not None, BD=block,
        BN=triton.next_power_of_2(size), BR=max(16, triton.next_power_of_2(rank)), PDL=pdl,
        **launch_options(pdl, num_warps=warps),
    )  # fmt: skip
