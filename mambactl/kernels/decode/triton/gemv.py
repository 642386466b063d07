"""y = x W^T for few rows x [M, K] and many columns: the inner loops that read the weights once.

Two ways, both in one fixed order per element of y, so that a row depends on no other row:
- fused multiply-adds on the ordinary units for one or two rows; no tensor core, no shared memory,
  and the first tile of weights is on its way before the kernel that writes x has ended;
- tensor cores for up to 32 rows, K dealt out to the warps (a batched product summed at the end),
  because one chain of dependent products over all of K takes longer than reading W.
"""

import math
from dataclasses import dataclass, replace

import triton
import triton.language as tl

from mambactl.kernels.launch import dot, gdc_launch_dependents

# more rows are a library's business
SOME_ROWS = 32


@dataclass(frozen=True)
class Tiles:
    """A program's share: `columns` of y, K in steps of `depth` times `slices`.

    No `slices` means no tensor cores. `early`: launched while the kernel before still runs.
    """

    rows: int
    columns: int
    depth: int
    slices: int
    warps: int
    stages: int
    early: bool = True

    def shared_bytes(self, element_size: int) -> int:
        """Shared memory that a program takes at most: Triton holds a tile less than there are
        stages, and for fp32 up to one more, in which operands change their layout.
        """
        buffers = self.stages - 1 + (element_size > 2)
        tile = (self.rows + self.columns) * self.depth * self.slices
        return buffers * tile * element_size

    def fitted(self, element_size: int, limit: int) -> "Tiles":
        """Tiles that fit in `limit` bytes of shared memory: first fewer stages, then less depth."""
        tiles = self
        while tiles.shared_bytes(element_size) > limit and (tiles.stages > 2 or tiles.depth > 16):
            if tiles.stages > 2:
                tiles = replace(tiles, stages=tiles.stages - 1)
            else:
                tiles = replace(tiles, depth=tiles.depth // 2)
        return tiles

    def within(self, *widths: int) -> "Tiles | None":
        """Tiles whose columns divide all `widths`; None where those are too few."""
        columns = math.gcd(self.columns, *widths)
        # the narrowest product of a tensor core
        return None if self.slices and columns < 16 else replace(self, columns=columns)


# (columns, depth, slices, warps, stages, early) by operation, measured on an H200
_ONE = {
    "project": (8, 512, 0, 4, 1), "project_qkv": (4, 1024, 0, 4, 1),
    "add_residual": (4, 512, 0, 4, 1), "swiglu": (4, 1024, 0, 4, 1, False),
    "head": (16, 256, 0, 4, 1),
}  # fmt: skip
_TWO = _ONE | {"project": (8, 256, 0, 4, 1)}
_EIGHT = {
    "project": (16, 64, 4, 4, 4), "project_qkv": (16, 128, 4, 4, 4),
    "add_residual": (16, 128, 4, 4, 4, False), "swiglu": (32, 128, 4, 4, 3),
    "head": (32, 128, 4, 4, 3),
}  # fmt: skip
_SIXTEEN = {
    "project": (32, 64, 4, 4, 4), "project_qkv": (16, 256, 2, 2, 3),
    "add_residual": (16, 128, 4, 4, 4, False), "swiglu": (32, 128, 2, 2, 3),
    "head": (32, 128, 2, 2, 3),
}  # fmt: skip
_THIRTY_TWO = {"add_residual": (32, 128, 4, 4, 3)}
_TABLES = {1: _ONE, 2: _TWO, 8: _EIGHT, 16: _SIXTEEN, 32: _THIRTY_TWO}


def tiles_for(name: str, rows: int, exact: bool = False) -> Tiles | None:
    """Tiles of an operation for M = `rows`; None where a library's product is faster.

    `exact` keeps to one way up to 16 rows, so that a row is bitwise the same alone and among 16.
    """
    smallest = 16 if exact else 1
    padded = next((size for size in _TABLES if size >= max(rows, smallest)), None)
    table = _TABLES.get(padded, {})
    return Tiles(padded, *table[name]) if name in table else None


@triton.jit
def _inside(at, K: tl.constexpr, STEP: tl.constexpr):
    return (at < K) if K % STEP != 0 else (at >= 0)


@triton.jit
def _add_row(acc, x, at, ok, w_tile, BN: tl.constexpr, DEPTH: tl.constexpr):
    """acc [BN, DEPTH / 8] + the sums of eight neighbouring products, which one thread holds."""
    row = tl.load(x + at, mask=ok, other=0.0).to(tl.float32)
    return acc + tl.sum(tl.reshape(w_tile * row[None, :], [BN, DEPTH // 8, 8]), axis=2)


@triton.jit
def first_tile(
    w, w_index, col_ok, K: tl.constexpr, BN: tl.constexpr, DEPTH: tl.constexpr,
    SLICES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Tile of w that a product can read before x is there; hand it to `product`."""
    if PDL:
        gdc_launch_dependents()
    if SLICES == 0:
        at = tl.arange(0, DEPTH)
        tile = tl.load(
            w + w_index.to(tl.int64)[:, None] * K + at[None, :],
            mask=col_ok[:, None] & _inside(at, K, DEPTH)[None, :],
            other=0.0,
        )
    else:
        tile = tl.zeros([BN, 1], w.dtype.element_ty)
    return tile


@triton.jit
def _multiply_add(
    one, two, x, stride, w_rows, ahead, col_ok, M, K: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
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
        one = _add_row(one, x, at, ok, w_tile, BN, DEPTH)
        if BM == 2:
            two = _add_row(two, x + stride, at, ok & (M > 1), w_tile, BN, DEPTH)
    return one, two


@triton.jit
def _tensor_cores(
    acc, x_rows, w_rows, row_ok, col_ok, K: tl.constexpr, BM: tl.constexpr, DEPTH: tl.constexpr,
    SLICES: tl.constexpr,
):  # fmt: skip
    slices = tl.arange(0, SLICES)[:, None, None] * DEPTH
    for k in range(0, K, DEPTH * SLICES):
        at = k + slices + tl.arange(0, DEPTH)[None, None, :]  # [S, 1, DEPTH]
        ok = _inside(at, K, DEPTH * SLICES)
        w_tile = tl.load(
            w_rows[None, :, None] + at, mask=col_ok[None, :, None] & ok, other=0.0
        )  # [S, BN, DEPTH]
        x_tile = tl.load(
            x_rows[None, :, None] + at, mask=row_ok[None, :, None] & ok, other=0.0
        )  # [S, BM, DEPTH]
        if BM == 8:
            acc = dot(w_tile, tl.permute(x_tile, (0, 2, 1)), acc)
        else:
            acc = dot(x_tile, tl.permute(w_tile, (0, 2, 1)), acc)
    return acc


@triton.jit
def no_sums(BM: tl.constexpr, BN: tl.constexpr, DEPTH: tl.constexpr, SLICES: tl.constexpr):
    """Partial sums of no product yet, one tensor for each of up to two rows without tensor cores.

    Several products share them, and with them the sum over threads that `whole_sums` takes.
    """
    # up to eight rows of x are the narrow side of a tensor core's product, sixteen the other one
    if SLICES == 0:
        one = tl.zeros([BN, DEPTH // 8], tl.float32)
    elif BM == 8:
        one = tl.zeros([SLICES, BN, BM], tl.float32)
    else:
        one = tl.zeros([SLICES, BM, BN], tl.float32)
    return one, one


@triton.jit
def add_product(
    one, two, x, stride, w, first, rows, M, w_index, col_ok, K: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, DEPTH: tl.constexpr, SLICES: tl.constexpr,
):  # fmt: skip
    """Partial sums plus those of x[rows] w[w_index]^T; `first` comes from `first_tile`.

    `rows` and `w_index` number the rows of x (`stride` apart) and w; beyond M and where `col_ok`
    is false nothing is read.
    """
    w_rows = w + w_index.to(tl.int64) * K
    if SLICES == 0:
        one, two = _multiply_add(one, two, x, stride, w_rows, first, col_ok, M, K, BM, BN, DEPTH)
    else:
        x_rows = x + rows.to(tl.int64) * stride
        one = _tensor_cores(one, x_rows, w_rows, rows < M, col_ok, K, BM, DEPTH, SLICES)
    return one, two


@triton.jit
def whole_sums(one, two, BM: tl.constexpr, SLICES: tl.constexpr):
    """The products [BM, BN] in fp32 of partial sums."""
    if SLICES == 0:
        y = tl.sum(one, axis=1)[None, :]
        if BM == 2:
            y = tl.permute(tl.join(tl.sum(one, axis=1), tl.sum(two, axis=1)), (1, 0))
    else:
        y = tl.sum(one, axis=0)
        if BM == 8:
            y = tl.permute(y, (1, 0))
    return y


@triton.jit
def product(
    x, stride, w, first, rows, M, w_index, col_ok, K: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, DEPTH: tl.constexpr, SLICES: tl.constexpr,
):  # fmt: skip
    """x[rows] w[w_index]^T in fp32 [BM, BN], once x is there; see `add_product`."""
    one, two = no_sums(BM, BN, DEPTH, SLICES)
    one, two = add_product(
        one, two, x, stride, w, first, rows, M, w_index, col_ok, K, BM, BN, DEPTH, SLICES
    )
    return whole_sums(one, two, BM, SLICES)


@triton.jit
def square_parts(squares, stride, rows, row_ok, TILES: tl.constexpr):
    """Partial sums of squares [BM, tiles]: read early, added up when the product is done."""
    tiles = tl.arange(0, triton.next_power_of_2(TILES))
    return tl.load(
        squares + rows[:, None] * stride + tiles[None, :],
        mask=row_ok[:, None] & (tiles < TILES)[None, :],
        other=0.0,
    )


@triton.jit
def norm_rate(parts, eps, K: tl.constexpr):
    """rsqrt(mean of squares + eps) [BM]."""
    return tl.rsqrt(tl.sum(parts, axis=1) / K + eps)
