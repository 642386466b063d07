"""Products with weights of 8 bits for more rows than a decode pass of one sequence has.

x is taken to fp16 first, each row times a power of two that brings its largest entry near fp16's
largest: of bf16 nothing is lost above 2^-28 of that entry. Weights go to fp16 between memory and
the tensor cores, exactly; sums are fp32. `kernels.byte_matrix.linear` says what is computed.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from mambactl.kernels.byte_matrix import ByteMatrix, linear
from mambactl.kernels.launch import dot, launch_options, rounded, widened

# from here on the tensor cores' time counts, and weights in the type of x are worth their writing
MOST_ROWS = 256
HALVES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class ManyRowsTiles:
    """A program's share of the product: rows of x, rows of the weights, depth of a step."""

    rows: int
    columns: int
    depth: int
    stages: int


def tiles_of(rows: int) -> ManyRowsTiles:
    """Tiles of a product with this many rows of x."""
    if rows <= 32:
        return ManyRowsTiles(32, 32, 128, 6)
    return ManyRowsTiles(64, 32, 128, 6) if rows <= 64 else ManyRowsTiles(64, 64, 128, 4)


@triton.jit
def _halve_kernel(x, x_stride, out, factor, K: tl.constexpr, BLOCK: tl.constexpr):
    m = tl.program_id(0).to(tl.int64)
    largest = tl.zeros([BLOCK], tl.float32)
    for k in range(0, K, BLOCK):
        at = k + tl.arange(0, BLOCK)
        row = tl.load(x + m * x_stride + at, mask=at < K, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(row))
    # tiny rows are as good as empty ones
    top = tl.maximum(tl.max(largest), 1e-30)
    # 2^14 over the power of two below the largest entry, by exponents
    power = 0x7F000000 - (top.to(tl.int32, bitcast=True) & 0x7F800000) + (14 << 23)
    scale = power.to(tl.float32, bitcast=True)
    tl.store(factor + m, scale)
    for k in range(0, K, BLOCK):
        at = k + tl.arange(0, BLOCK)
        row = tl.load(x + m * x_stride + at, mask=at < K, other=0.0).to(tl.float32)
        tl.store(out + m * K + at, (row * scale).to(tl.float16), mask=at < K)


@triton.jit(do_not_specialize=["M"])
def _product_kernel(
    x, factor, w, scale, before, y, M, N, K: tl.constexpr, ADD: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    # programs that share weights run side by side
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    cols = tl.program_id(1) * BN + tl.arange(0, BN)
    row_ok, col_ok = rows < M, cols < N
    x_rows = x + rows.to(tl.int64) * K
    w_rows = w + cols.to(tl.int64) * K
    total = tl.zeros([BN, BM], tl.float32)
    for k in range(0, K, BK):
        at = k + tl.arange(0, BK)
        inside = (at < K) if K % BK != 0 else (at >= 0)
        w_tile = tl.load(
            w_rows[:, None] + at[None, :], mask=col_ok[:, None] & inside[None, :], other=0
        )  # [BN, BK]
        x_tile = tl.load(
            x_rows[None, :] + at[:, None], mask=row_ok[None, :] & inside[:, None], other=0.0
        )  # [BK, BM]
        total = dot(widened(w_tile, tl.float16), x_tile, total)
    by_column = tl.load(scale + cols, mask=col_ok, other=0.0)
    by_row = tl.load(factor + rows, mask=row_ok, other=1.0)
    # by a power of two
    total = tl.trans(total * by_column[:, None]) / by_row[:, None]  # [BM, BN]
    elements = rows[:, None].to(tl.int64) * N + cols[None, :]
    ok = row_ok[:, None] & col_ok[None, :]
    if ADD:
        total += tl.load(before + elements, mask=ok, other=0.0).to(tl.float32)
    tl.store(y + elements, rounded(total, y.dtype.element_ty), mask=ok)


def halved(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [M, K] in fp16 times a power of two for each row, and those factors [M]."""
    M, K = x.shape
    out, factor = x.new_empty(M, K, dtype=torch.float16), x.new_empty(M, dtype=torch.float32)
    block = min(2048, triton.next_power_of_2(K))
    _halve_kernel[(M,)](
        x, x.stride(0), out, factor, K=K, BLOCK=block, **launch_options(False, num_warps=4)
    )
    return out, factor


def product(x: Tensor, w: ByteMatrix, before: Tensor | None = None) -> Tensor:
    """x W^T [M, N] for x [M, K], plus `before` [M, N], in the type of x."""
    M, N = len(x), len(w)
    if M > MOST_ROWS or x.dtype not in HALVES:
        y = linear(x, w)
        return y if before is None else y + before
    half, factor = halved(x)
    y, tiles = x.new_empty(M, N), tiles_of(M)
    grid = (triton.cdiv(M, tiles.rows), triton.cdiv(N, tiles.columns))
    _product_kernel[grid](
        half, factor, w.bytes, w.scale, y if before is None else before, y, M, N,
        K=x.shape[1], ADD=before is not None, BM=tiles.rows, BN=tiles.columns, BK=tiles.depth,
        **launch_options(False, num_warps=4, num_stages=tiles.stages),
    )  # fmt: skip
    return y
