"""Tokens into the residual stream and out of it: embedding rows, and the best of all pieces.

Signatures and meaning are those of `kernels.decode.reference.linear`.
"""

import triton
import triton.language as tl
from torch import Tensor

from mambactl.kernels.launch import gdc_launch_dependents, gdc_wait, launch_options, rounded


@triton.jit(do_not_specialize=["T"])
def _embed_kernel(
    tokens, row_stride, table, gain, hidden, scaled, squares, factor, T, N, V,
    FACTOR: tl.constexpr, TILES: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    token = tl.load(tokens + m // T * row_stride + m % T)
    token = tl.minimum(tl.maximum(token, 0), V - 1).to(tl.int64)
    total = 0.0
    for at in range(0, N, BLOCK):
        cols = at + tl.arange(0, BLOCK)
        ok = cols < N
        stream = tl.load(table + token * N + cols, mask=ok, other=0.0)
        if FACTOR:
            stream = rounded(stream.to(tl.float32) * factor, hidden.dtype.element_ty)
        value = stream.to(tl.float32)
        weight = tl.load(gain + cols, mask=ok, other=0.0).to(tl.float32)
        element = m.to(tl.int64) * N + cols
        tl.store(hidden + element, stream, mask=ok)
        tl.store(scaled + element, rounded(value * weight, stream.dtype), mask=ok)
        total += tl.sum(value * value)
    tiles = tl.arange(0, triton.next_power_of_2(TILES))
    tl.store(squares + m * TILES + tiles, tl.where(tiles == 0, total, 0.0), mask=tiles < TILES)


@triton.jit
def _normed_kernel(
    branch, branch_squares, eps, hidden, gain, scaled, squares, N, FROM: tl.constexpr,
    TILES: tl.constexpr, PLAIN: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One row: hidden += branch / rms, then its scaled form and its sum of squares."""
    m = tl.program_id(0)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    parts = tl.arange(0, triton.next_power_of_2(FROM))
    sums = tl.load(branch_squares + m * FROM + parts, mask=parts < FROM, other=0.0)
    rate = tl.rsqrt(tl.sum(sums) / N + eps)
    kind = hidden.dtype.element_ty
    total = 0.0
    for at in range(0, N, BLOCK):
        cols = at + tl.arange(0, BLOCK)
        ok = cols < N
        element = m.to(tl.int64) * N + cols
        value = tl.load(branch + element, mask=ok, other=0.0).to(tl.float32) * rate
        before = tl.load(hidden + element, mask=ok, other=0.0).to(tl.float32)
        stream = rounded(before + rounded(value, kind).to(tl.float32), kind)
        value = stream.to(tl.float32)
        tl.store(hidden + element, stream, mask=ok)
        total += tl.sum(value * value)
        if not PLAIN:
            value = value * tl.load(gain + cols, mask=ok, other=0.0).to(tl.float32)
        tl.store(scaled + element, rounded(value, kind), mask=ok)
    if PLAIN:
        total = N * (1.0 - eps)
    # what was read is replaced where it lay
    tl.debug_barrier()
    tiles = tl.arange(0, triton.next_power_of_2(TILES))
    tl.store(squares + m * TILES + tiles, tl.where(tiles == 0, total, 0.0), mask=tiles < TILES)


@triton.jit
def _pick_kernel(best, best_index, tokens, stride, pieces, BLOCK: tl.constexpr, PDL: tl.constexpr):
    m = tl.program_id(0)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    which = tl.full([BLOCK], 2147483647, tl.int32)
    for at in range(0, pieces, BLOCK):
        piece = at + tl.arange(0, BLOCK)
        value = tl.load(best + m * pieces + piece, mask=piece < pieces, other=float("-inf"))
        index = tl.load(best_index + m * pieces + piece, mask=piece < pieces, other=2147483647)
        # pieces come in the order of their tokens, so an equal one is a higher token
        better = value > top
        top, which = tl.where(better, value, top), tl.where(better, index, which)
    highest = tl.max(top)
    tl.store(tokens + m * stride, tl.min(tl.where(top == highest, which, 2147483647)))


def embed(
    tokens: Tensor, table: Tensor, gain: Tensor, hidden: Tensor, scaled: Tensor, squares: Tensor,
    factor: float = 1.0, *, pdl: bool,
) -> None:  # fmt: skip
    """See `kernels.decode.reference.linear.embed`; tokens [B, T] may be a piece of wider rows."""
    M, N = hidden.shape
    _embed_kernel[(M,)](
        tokens, tokens.stride(0), table, gain, hidden, scaled, squares, factor, tokens.shape[1], N,
        table.shape[0], FACTOR=factor != 1, TILES=squares.shape[1],
        BLOCK=min(4096, triton.next_power_of_2(N)), PDL=pdl, **launch_options(pdl, num_warps=8),
    )  # fmt: skip


def add_normed(
    scaled: Tensor, squares: Tensor, eps: float, hidden: Tensor, gain: Tensor | None,
    out_scaled: Tensor, out_squares: Tensor, *, pdl: bool,
) -> None:  # fmt: skip
    """Add the norm of another stream; see `kernels.decode.reference.linear.add_normed`."""
    M, N = hidden.shape
    _normed_kernel[(M,)](
        scaled, squares, eps, hidden, scaled if gain is None else gain, out_scaled, out_squares, N,
        FROM=squares.shape[1], TILES=out_squares.shape[1], PLAIN=gain is None,
        BLOCK=min(4096, triton.next_power_of_2(N)), PDL=pdl, **launch_options(pdl, num_warps=8),
    )  # fmt: skip


def pick(best: Tensor, best_index: Tensor, tokens: Tensor, *, pdl: bool) -> None:
    """Choose the best token of every row; see `kernels.decode.reference.linear.pick`."""
    M, pieces = best.shape
    _pick_kernel[(M,)](
        best, best_index, tokens, tokens.stride(0), pieces,
        BLOCK=min(1024, triton.next_power_of_2(pieces)), PDL=pdl,
        **launch_options(pdl, num_warps=8),
    )  # fmt: skip
