"""y = x W^T for few rows x [M, K] and many columns: the inner loops that read the weights once.

Two ways, both in one fixed order per element of y, so that a row depends on no other row:
- fused multiply-adds on the ordinary units for one or two rows; no tensor core, no shared memory,
  and the first tile of weights is on its way before the kernel that writes x has ended;
- tensor cores for up to 32 rows, K dealt out to the warps (a batched product summed at the end),
  because one chain of dependent products over all of K takes longer than reading W.
"""

from dataclasses import dataclass

import triton
import triton.language as tl

from mambactl.kernels.triton.launch import dot, gdc_launch_dependents, gdc_wait

# most rows of the two ways; more rows are a library's business
FEW_ROWS, SOME_ROWS = 2, 32


@dataclass(frozen=True)
class Tiles:
    """A program's share: `columns` of y, K in steps of `depth` times `slices` (0: no tensor cores)."""

    rows: int
    columns: int
    depth: int
    slices: int
    warps: int
    stages: int


def tiles_for(rows: int, columns: int, exact: bool = False) -> Tiles:
    """Tiles for M = `rows`; `columns` (4 or 16 by default) must divide what belongs together.

    `exact` keeps to one way whatever M is, so that a row is bitwise the same alone and among 16.
    """
    if rows <= FEW_ROWS and not exact:
        return Tiles(triton.next_power_of_2(rows), columns, 512 if columns <= 4 else 256, 0, 4, 1)
    padded = max(16, triton.next_power_of_2(rows))
    return Tiles(padded, 16, 128, 4, 4, 4 if padded == 16 else 3)


@triton.jit
def _inside(at, K: tl.constexpr, STEP: tl.constexpr):
    return (at < K) if K % STEP != 0 else (at >= 0)


@triton.jit
def _add_row(acc, x, w_tile, at, ok, BN: tl.constexpr, DEPTH: tl.constexpr):
    """acc [BN, DEPTH / 8] + the products of eight neighbours, which one thread holds."""
    row = tl.load(x + at, mask=ok, other=0.0).to(tl.float32)
    return acc + tl.sum(tl.reshape(w_tile * row[None, :], [BN, DEPTH // 8, 8]), axis=2)


@triton.jit
def _multiply_add(
    x, stride, w_rows, col_ok, M, K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    DEPTH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    at = tl.arange(0, DEPTH)
    ok = _inside(at, K, DEPTH)
    ahead = tl.load(w_rows[:, None] + at[None, :], mask=col_ok[:, None] & ok[None, :], other=0.0)
    if PDL:
        gdc_wait()
    one = tl.zeros([BN, DEPTH // 8], tl.float32)
    two = tl.zeros([BN, DEPTH // 8], tl.float32)
    for k in range(0, K, DEPTH):
        at = k + tl.arange(0, DEPTH)
        ok = _inside(at, K, DEPTH)
        w_tile = ahead.to(tl.float32)
        more = at + DEPTH < K
        ahead = tl.load(
            w_rows[:, None] + (at + DEPTH)[None, :],
            mask=col_ok[:, None] & more[None, :],
            other=0.0,
        )
        one = _add_row(one, x, w_tile, at, ok, BN, DEPTH)
        if BM == 2:
            two = _add_row(two, x + stride, w_tile, at, ok & (M > 1), BN, DEPTH)
    y = tl.sum(one, axis=1)[None, :]
    if BM == 2:
        y = tl.permute(tl.join(tl.sum(one, axis=1), tl.sum(two, axis=1)), (1, 0))
    return y


@triton.jit
def _tensor_cores(
    x_rows, w_rows, row_ok, col_ok, K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    DEPTH: tl.constexpr, SLICES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_wait()
    slices = tl.arange(0, SLICES)[:, None, None] * DEPTH
    acc = tl.zeros([SLICES, BM, BN], tl.float32)
    for k in range(0, K, DEPTH * SLICES):
        at = k + slices + tl.arange(0, DEPTH)[None, None, :]  # [S, 1, DEPTH]
        ok = _inside(at, K, DEPTH * SLICES)
        w_tile = tl.load(
            w_rows[None, :, None] + at, mask=col_ok[None, :, None] & ok, other=0.0
        )  # [S, BN, DEPTH]
        x_tile = tl.load(
            x_rows[None, :, None] + at, mask=row_ok[None, :, None] & ok, other=0.0
        )  # [S, BM, DEPTH]
        acc = dot(x_tile, tl.permute(w_tile, (0, 2, 1)), acc)
    return tl.sum(acc, axis=0)


@triton.jit
def product(
    x, stride, w, rows, M, w_index, col_ok, K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    DEPTH: tl.constexpr, SLICES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """x[rows] w[w_index]^T in fp32 [BM, BN]; waits for the kernel before, so call it first.

    `rows` and `w_index` number the rows of x (`stride` apart) and w; beyond M and where `col_ok`
    is false nothing is read.
    """
    w_rows = w + w_index.to(tl.int64) * K
    if PDL:
        gdc_launch_dependents()
    if SLICES == 0:
        # rows of a pass with one or two rows are rows 0 and 1
        y = _multiply_add(x, stride, w_rows, col_ok, M, K, BM, BN, DEPTH, PDL)
    else:
        x_rows = x + rows.to(tl.int64) * stride
        y = _tensor_cores(x_rows, w_rows, rows < M, col_ok, K, BM, BN, DEPTH, SLICES, PDL)
    return y


@triton.jit
def norm_scale(squares, stride, rows, row_ok, eps, K: tl.constexpr, TILES: tl.constexpr):
    """rsqrt(mean of squares + eps) [BM] from partial sums of squares [M, TILES]."""
    tiles = tl.arange(0, triton.next_power_of_2(TILES))
    parts = tl.load(
        squares + rows[:, None] * stride + tiles[None, :],
        mask=row_ok[:, None] & (tiles < TILES)[None, :],
        other=0.0,
    )
    return tl.rsqrt(tl.sum(parts, axis=1) / K + eps)
