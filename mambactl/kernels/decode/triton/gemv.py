"""y = x W^T for few rows x [M, K] and many columns: the inner loops that read the weights once.

Two ways, both in one fixed order per element of y, so that a row depends on no other row:
- fused multiply-adds on the ordinary units for one or two rows; no tensor core, no shared memory,
  and the first tile of weights is on its way before the kernel that writes x has ended;
- tensor cores for up to 32 rows, K dealt out to the warps (a batched product summed at the end),
  because one chain of dependent products over all of K takes longer than reading W.
Weights of 8 bits (`kernels.byte_matrix`) have a scale for each row of a multiple of four numbers.
On the ordinary units they widen to fp32, as others do. A tensor core gets them in fp16, to which
few instructions take two, and x in fp16 times a power of two, `input_factor`, that keeps it in
range: of bf16 that loses 2^-20 of the row's norm at most. x in fp32 stays fp32.
"""

import math
from dataclasses import dataclass, replace

import triton
import triton.language as tl
from torch import Tensor

from mambactl.kernels.byte_matrix import ByteMatrix, Matrix
from mambactl.kernels.launch import dot, four_numbers, gdc_launch_dependents, widened

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

    def reading(self, w: Matrix) -> "Tiles":
        """Tiles for the type of w: 8 bits take twice the depth, for as many bytes in flight.

        A tensor core's keep their depth, for x takes its part of it.
        """
        deeper = isinstance(w, ByteMatrix) and not self.slices
        return replace(self, depth=2 * self.depth) if deeper else self


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


def operand(w: Matrix) -> tuple[Tensor, Tensor]:
    """Weights as kernels read them and the scales of their rows; only bytes have scales."""
    return (w.bytes, w.scale) if isinstance(w, ByteMatrix) else (w, w)


@triton.jit
def _inside(at, K: tl.constexpr, STEP: tl.constexpr):
    return (at < K) if K % STEP != 0 else (at >= 0)


@triton.jit
def _add_row(acc, x, at, ok, w_tile, BN: tl.constexpr, DEPTH: tl.constexpr):
    """acc [BN, DEPTH / 8] + the sums of eight neighbouring products, which one thread holds."""
    row = tl.load(x + at, mask=ok, other=0.0).to(tl.float32)
    return acc + tl.sum(tl.reshape(w_tile * row[None, :], [BN, DEPTH // 8, 8]), axis=2)


@triton.jit
def _four_columns(x, at, ok):
    """x[4 at] to x[4 at + 3] in fp32."""
    if x.dtype.element_ty == tl.bfloat16:
        words = tl.load(x.to(tl.pointer_type(tl.int64), bitcast=True) + at, mask=ok, other=0)
        low, high = words.to(tl.int32), (words >> 32).to(tl.int32)
        a, b = (low << 16).to(tl.float32, bitcast=True), (low & -65536).to(tl.float32, bitcast=True)
        c = (high << 16).to(tl.float32, bitcast=True)
        d = (high & -65536).to(tl.float32, bitcast=True)
    else:
        a = tl.load(x + 4 * at, mask=ok, other=0.0).to(tl.float32)
        b = tl.load(x + 4 * at + 1, mask=ok, other=0.0).to(tl.float32)
        c = tl.load(x + 4 * at + 2, mask=ok, other=0.0).to(tl.float32)
        d = tl.load(x + 4 * at + 3, mask=ok, other=0.0).to(tl.float32)
    return a, b, c, d


@triton.jit
def _add_row_of_words(acc, x, at, ok, w_words, KIND: tl.constexpr):
    """acc [BN, DEPTH / 4] + the sums of four neighbouring products, whose weights are a word."""
    a, b, c, d = _four_columns(x, at, ok)
    first, second, third, fourth = four_numbers(w_words, KIND)
    acc = acc + first * a[None, :]
    acc = acc + second * b[None, :]
    acc = acc + third * c[None, :]
    return acc + fourth * d[None, :]


@triton.jit
def word_columns(COUNT: tl.constexpr):
    """Indices 0 to COUNT - 1 of words, laid out so that a thread loads two neighbours.

    Of x those are 16 bytes. With four words a thread, x would pass through shared memory at every
    step to get to the threads that need it.
    """
    return tl.max_contiguous(tl.arange(0, COUNT), 2)


@triton.jit
def first_tile(
    w, w_index, col_ok, K: tl.constexpr, BN: tl.constexpr, DEPTH: tl.constexpr,
    SLICES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Tile of w that a product can read before x is there; hand it to `product`."""
    if PDL:
        gdc_launch_dependents()
    if SLICES == 0 and w.dtype.element_ty.primitive_bitwidth == 8:
        tl.static_assert(K % 4 == 0)
        at = word_columns(DEPTH // 4)
        tile = tl.load(
            w.to(tl.pointer_type(tl.int32), bitcast=True)
            + w_index.to(tl.int64)[:, None] * (K // 4)
            + at[None, :],
            mask=col_ok[:, None] & _inside(at, K // 4, DEPTH // 4)[None, :],
            other=0,
        )
    elif SLICES == 0:
        at = tl.arange(0, DEPTH)
        tile = tl.load(
            w + w_index.to(tl.int64)[:, None] * K + at[None, :],
            mask=col_ok[:, None] & _inside(at, K, DEPTH)[None, :],
            other=0.0,
        )
    else:
        # read by nobody
        tile = tl.zeros([BN, 1], tl.float32)
    return tile


@triton.jit
def input_factor(w, rate, SLICES: tl.constexpr):
    """Powers of two [BM] that keep x in the range of fp16 beside weights of 8 bits.

    They follow the norm's factor `rate`, so that entries of up to 2^20 times the norm fit.
    """
    if SLICES == 0 or w.dtype.element_ty.primitive_bitwidth != 8:
        factor = tl.full(rate.shape, 1.0, tl.float32)
    else:
        factor = (rate.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        factor = factor * 0.0625
    return factor


@triton.jit
def _inverse(power):
    """1 / power of a power of two, exact."""
    return (0x7F000000 - power.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)


@triton.jit
def scaled_sums(y, w, scale, factor, w_index, col_ok):
    """Products y [BM, BN] with weights of 8 bits, their scales applied and `factor` taken back."""
    if w.dtype.element_ty.primitive_bitwidth == 8:
        by_column = tl.load(scale + w_index, mask=col_ok, other=1.0)
        y = y * by_column[None, :] * _inverse(factor)[:, None]
    return y


@triton.jit
def rescale(one, two, w, scale, following, w_index, col_ok, BM: tl.constexpr, SLICES: tl.constexpr):
    """Convert partial sums from the scales of w to those of the weights that come next."""
    if w.dtype.element_ty.primitive_bitwidth == 8:
        here = tl.load(scale + w_index, mask=col_ok, other=1.0)
        by_column = tl.div_rn(here, tl.load(following + w_index, mask=col_ok, other=1.0))
        if SLICES == 0:
            by_column = by_column[:, None]
        elif BM == 8:
            by_column = by_column[None, :, None]
        else:
            by_column = by_column[None, None, :]
        one, two = one * by_column, two * by_column
    return one, two


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
def _multiply_add_words(
    one, two, x, stride, w_rows, ahead, col_ok, M, K: tl.constexpr, BM: tl.constexpr,
    DEPTH: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """As `_multiply_add` for weights of 8 bits, four of them at a time; x is `K` words long."""
    for k in range(0, K, DEPTH):
        at = k + word_columns(DEPTH)
        ok = _inside(at, K, DEPTH)
        words = ahead
        more = at + DEPTH < K
        ahead = tl.load(
            w_rows[:, None] + (at + DEPTH)[None, :], mask=col_ok[:, None] & more[None, :], other=0
        )
        one = _add_row_of_words(one, x, at, ok, words, KIND)
        if BM == 2:
            two = _add_row_of_words(two, x + stride, at, ok & (M > 1), words, KIND)
    return one, two


@triton.jit
def _tensor_cores(
    acc, x_rows, w_rows, factor, row_ok, col_ok, K: tl.constexpr, BM: tl.constexpr,
    DEPTH: tl.constexpr, SLICES: tl.constexpr,
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
        if w_tile.dtype.primitive_bitwidth == 8:
            kind = tl.float32 if x_tile.dtype == tl.float32 else tl.float16
            w_tile = widened(w_tile, kind)
            x_tile = (x_tile.to(tl.float32) * factor[None, :, None]).to(kind)
        if BM == 8:
            acc = dot(w_tile, tl.permute(x_tile, (0, 2, 1)), acc)
        else:
            acc = dot(x_tile, tl.permute(w_tile, (0, 2, 1)), acc)
    return acc


@triton.jit
def no_sums(w, BM: tl.constexpr, BN: tl.constexpr, DEPTH: tl.constexpr, SLICES: tl.constexpr):
    """Zeroed partial sums of products with w; without tensor cores a tensor for each of two rows.

    Several products share them, and with them the sum over threads that `whole_sums` takes.
    """
    # up to eight rows of x are the narrow side of a tensor core's product, sixteen the other one
    if SLICES == 0:
        one = tl.zeros(
            [BN, DEPTH // (4 if w.dtype.element_ty.primitive_bitwidth == 8 else 8)], tl.float32
        )
    elif BM == 8:
        one = tl.zeros([SLICES, BN, BM], tl.float32)
    else:
        one = tl.zeros([SLICES, BM, BN], tl.float32)
    return one, one


@triton.jit
def add_product(
    one, two, x, stride, w, first, factor, rows, M, w_index, col_ok, K: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, DEPTH: tl.constexpr, SLICES: tl.constexpr,
):  # fmt: skip
    """Add those of x[rows] w[w_index]^T to partial sums.

    `first` comes from `first_tile`, and `factor` from `input_factor`: sums with weights of 8 bits
    are those of x times it.
    `rows` and `w_index` number the rows of x (`stride` apart) and w; beyond M and where `col_ok`
    is false nothing is read.
    """
    w_rows = w + w_index.to(tl.int64) * K
    if SLICES == 0 and w.dtype.element_ty.primitive_bitwidth == 8:
        words = w_rows.to(tl.pointer_type(tl.int32), bitcast=True)
        one, two = _multiply_add_words(
            one, two, x, stride, words, first, col_ok, M, K // 4, BM, DEPTH // 4, w.dtype.element_ty
        )
    elif SLICES == 0:
        one, two = _multiply_add(one, two, x, stride, w_rows, first, col_ok, M, K, BM, BN, DEPTH)
    else:
        x_rows = x + rows.to(tl.int64) * stride
        one = _tensor_cores(one, x_rows, w_rows, factor, rows < M, col_ok, K, BM, DEPTH, SLICES)
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
    x, stride, w, scale, first, factor, rows, M, w_index, col_ok, K: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, DEPTH: tl.constexpr, SLICES: tl.constexpr,
):  # fmt: skip
    """x[rows] w[w_index]^T in fp32 [BM, BN], once x is there; see `add_product`."""
    one, two = no_sums(w, BM, BN, DEPTH, SLICES)
    one, two = add_product(
        one, two, x, stride, w, first, factor, rows, M, w_index, col_ok, K, BM, BN, DEPTH, SLICES
    )
    return scaled_sums(whole_sums(one, two, BM, SLICES), w, scale, factor, w_index, col_ok)


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
