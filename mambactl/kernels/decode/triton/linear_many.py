"""Decode passes of many rows: the matrix products are the library's, these kernels surround them.

Elementwise counterparts of `kernels.decode.triton.linear`, for products that arrive already
multiplied.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mambactl.kernels.byte_matrix import ByteMatrix, Matrix
from mambactl.kernels.decode.operations import AttentionArguments
from mambactl.kernels.decode.triton.decode_attention import slot_of
from mambactl.kernels.decode.triton.gemv import norm_rate, square_parts
from mambactl.kernels.launch import gdc_launch_dependents, gdc_wait, launch_options, rounded
from mambactl.kernels.sequence import byte_matrix
from mambactl.present import present


@triton.jit
def _tile(y, stride, m, cols, ok, squares, s_stride, eps, bias, D: tl.constexpr,
          TILES: tl.constexpr, BIAS: tl.constexpr):  # fmt: skip
    """Row m of the normed product at `cols`, in fp32; TILES = 0 leaves the norm out."""
    value = tl.load(y + m.to(tl.int64) * stride + cols, mask=ok, other=0.0).to(tl.float32)
    if TILES > 0:
        one = m + tl.arange(0, 1)
        parts = square_parts(squares, s_stride, one, one >= 0, TILES)
        value = value * tl.sum(norm_rate(parts, eps, D))
    if BIAS:
        value += tl.load(bias + cols, mask=ok, other=0.0).to(tl.float32)
    return value


@triton.jit(do_not_specialize=["T", "offset", "scale"])
def _ring_kernel(
    y, stride, squares, s_stride, eps, bias, plain, ring, start, count, N, T, offset, scale,
    ring_lo, ring_hi, D: tl.constexpr, TILES: tl.constexpr, SLOTS: tl.constexpr, BIAS: tl.constexpr,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(1)
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    value = _tile(y, stride, m, cols, cols < N, squares, s_stride, eps, bias, D, TILES, BIAS)
    value = rounded(value, plain.dtype.element_ty)
    b, t = m // T, m % T
    at = tl.load(start + b) + offset + t
    kept = (t < tl.load(count + b) * scale) & (at >= 0)
    width = ring_hi - ring_lo
    inside = (cols >= ring_lo) & (cols < ring_hi)
    slot = (b * SLOTS + at % SLOTS).to(tl.int64) * width
    tl.store(ring + slot + cols - ring_lo, value, mask=inside & kept)
    rest = tl.where(cols >= ring_hi, cols - width, cols)
    tl.store(plain + m.to(tl.int64) * (N - width) + rest, value, mask=(cols < N) & (inside == 0))


@triton.jit(do_not_specialize=["T", "offset", "scale"])
def _conv_kernel(
    ring, weight, bias, mixed, start, count, ring_width, width, T, offset, scale,
    SLOTS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(1)
    ch = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    b, t = m // T, m % T
    at = tl.load(start + b) + offset + t
    ok = (ch < width) & (t < tl.load(count + b) * scale) & (at >= 0)
    total = tl.load(bias + ch, mask=ok, other=0.0).to(tl.float32)
    for i in tl.static_range(4):
        back = at - 3 + i
        slot = (b * SLOTS + (back + SLOTS) % SLOTS).to(tl.int64) * ring_width
        raw = tl.load(ring + slot + ch, mask=ok & (back >= 0), other=0.0).to(tl.float32)
        total = tl.fma(raw, tl.load(weight + ch * 4 + i, mask=ok, other=0.0).to(tl.float32), total)
    out = rounded(total * tl.sigmoid(total), mixed.dtype.element_ty)
    tl.store(mixed + (b * SLOTS + at % SLOTS).to(tl.int64) * width + ch, out, mask=ok)


@triton.jit(do_not_specialize=["T", "offset", "scale"])
def _rope_kernel(
    y, stride, squares, s_stride, eps, bias, cos, sin, q, keys, values, start, count, T, offset,
    scale, slots, D: tl.constexpr, TILES: tl.constexpr, BIAS: tl.constexpr, H: tl.constexpr,
    HK: tl.constexpr, P: tl.constexpr, SINKS: tl.constexpr, RING: tl.constexpr,
    HALF: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    head, m = tl.program_id(0), tl.program_id(1)
    j = tl.arange(0, HALF)
    inside = j < P // 2
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    col = head * P + j
    low = _tile(y, stride, m, col, inside, squares, s_stride, eps, bias, D, TILES, BIAS)
    high = _tile(y, stride, m, col + P // 2, inside, squares, s_stride, eps, bias, D, TILES, BIAS)
    kind = q.dtype.element_ty
    low, high = rounded(low, kind).to(tl.float32), rounded(high, kind).to(tl.float32)
    b, t = m // T, m % T
    at = tl.load(start + b) + offset + t
    ok = inside & (t < tl.load(count + b) * scale) & (at >= 0)
    if head < H + HK:
        c = tl.load(cos + at * (P // 2) + j, mask=ok, other=0.0)
        s = tl.load(sin + at * (P // 2) + j, mask=ok, other=0.0)
        low, high = low * c - high * s, high * c + low * s
    slot = slot_of(at, SINKS, RING)
    if head < H:
        base = q + (m * H + head).to(tl.int64) * P
    elif head < H + HK:
        base = keys + ((b * HK + head - H).to(tl.int64) * slots + slot) * P
    else:
        base = values + ((b * HK + head - H - HK).to(tl.int64) * slots + slot) * P
    tl.store(base + j, rounded(low, kind), mask=ok)
    tl.store(base + j + P // 2, rounded(high, kind), mask=ok)


@triton.jit
def _swiglu_kernel(
    y, squares, s_stride, eps, out, N, D: tl.constexpr, TILES: tl.constexpr,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(1)
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ok = cols < N
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    kind = out.dtype.element_ty
    gate = _tile(y, 2 * N, m, cols, ok, squares, s_stride, eps, y, D, TILES, False)
    up = _tile(y, 2 * N, m, cols + N, ok, squares, s_stride, eps, y, D, TILES, False)
    gate, up = rounded(gate, kind).to(tl.float32), rounded(up, kind).to(tl.float32)
    opened = rounded(gate * tl.sigmoid(gate), kind).to(tl.float32)
    tl.store(out + m.to(tl.int64) * N + cols, rounded(opened * up, kind), mask=ok)


@triton.jit
def _stream_kernel(
    y, bias, hidden, gain, scaled, squares, s_stride, N, BIAS: tl.constexpr,
    BLOCK: tl.constexpr, TILES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One row: hidden += y (+ bias), then its scaled form and its sum of squares."""
    m = tl.program_id(0)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    total = 0.0
    kind = hidden.dtype.element_ty
    for at in range(0, N, BLOCK):
        cols = at + tl.arange(0, BLOCK)
        ok = cols < N
        element = m.to(tl.int64) * N + cols
        value = tl.load(y + element, mask=ok, other=0.0).to(tl.float32)
        if BIAS:
            value += tl.load(bias + cols, mask=ok, other=0.0).to(tl.float32)
            value = rounded(value, kind).to(tl.float32)
        stream = rounded(tl.load(hidden + element, mask=ok, other=0.0).to(tl.float32) + value, kind)
        value = stream.to(tl.float32)
        weight = tl.load(gain + cols, mask=ok, other=0.0).to(tl.float32)
        tl.store(hidden + element, stream, mask=ok)
        tl.store(scaled + element, rounded(value * weight, kind), mask=ok)
        total += tl.sum(value * value)
    tiles = tl.arange(0, triton.next_power_of_2(TILES))
    tl.store(squares + m * s_stride + tiles, tl.where(tiles == 0, total, 0.0), mask=tiles < TILES)


@triton.jit
def _best_kernel(
    y, squares, s_stride, eps, best, best_index, N, pieces, D: tl.constexpr, TILES: tl.constexpr,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(1)
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    value = _tile(y, N, m, cols, cols < N, squares, s_stride, eps, y, D, TILES, False)
    value = tl.where(cols < N, value, float("-inf"))
    top = tl.max(value)
    which = tl.min(tl.where(value == top, cols, 2147483647))
    tl.store(best + m * pieces + tl.program_id(0), top)
    tl.store(best_index + m * pieces + tl.program_id(0), which)


@triton.jit
def _logits_kernel(
    y, squares, s_stride, eps, logits, N, V, D: tl.constexpr, TILES: tl.constexpr,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(1)
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    value = _tile(y, N, m, cols, cols < N, squares, s_stride, eps, y, D, TILES, False)
    value = tl.where(cols < N, value, float("-inf"))
    tl.store(logits + m.to(tl.int64) * V + cols, value, mask=cols < V)


BLOCK = 1024


def _common(squares: Tensor, width: int, pdl: bool) -> dict:
    return {"D": width, "TILES": squares.shape[1], "PDL": pdl, **launch_options(pdl, num_warps=4)}


def _times(x: Tensor, w: Matrix, before: Tensor | None = None) -> Tensor:
    """x W^T [M, N] plus `before`, rounded to the type of x."""
    if isinstance(w, ByteMatrix):
        return byte_matrix.product(x, w, before)
    return torch.mm(x, w.T) if before is None else torch.addmm(before, x, w.T)


def project(
    scaled: Tensor, squares: Tensor, eps: float, w: Matrix, bias: Tensor | None, plain: Tensor,
    ring: Tensor, start: Tensor, count: Tensor, scale: int, *, T: int, offset: int, ring_lo: int,
    conv: tuple[Tensor, Tensor, Tensor] | None = None,
    rotation: tuple[Tensor, Tensor] | None = None, beside: Sequence[AttentionArguments] = (),
    pdl: bool,
) -> None:  # fmt: skip
    """Run an input projection; see `kernels.decode.reference.linear.project`."""
    (M, D), (_, slots, width) = scaled.shape, ring.shape
    N = w.shape[0] - sum(args.rows for args in beside)
    y = _times(scaled, w)  # [M, N + rows of the attentions]
    _ring_kernel[(triton.cdiv(N, BLOCK), M)](
        y, y.stride(0), squares, squares.stride(0), eps, y if bias is None else bias, plain, ring,
        start, count, N, T, offset, scale, ring_lo, ring_lo + width, SLOTS=slots,
        BIAS=bias is not None, BLOCK=BLOCK, **_common(squares, D, pdl),
    )  # fmt: skip
    if conv is not None:
        channels = conv[2].shape[2]
        _conv_kernel[(triton.cdiv(channels, BLOCK), M)](
            ring, *conv, start, count, width, channels, T, offset, scale, SLOTS=slots, BLOCK=BLOCK,
            PDL=pdl, **launch_options(pdl, num_warps=4),
        )  # fmt: skip
    for args in beside:
        _put_heads(
            y[:, N : N + args.rows], squares, eps, None if bias is None else bias[N:],
            *present(rotation),
            q=args.q, keys=args.keys, values=args.values, start=start, count=count, scale=scale,
            T=T, offset=offset, sinks=args.sinks, ring=args.ring, depth=D, pdl=pdl,
        )  # fmt: skip
        N += args.rows


def mamba1_low(
    mixed: Tensor, w: Tensor, low: Tensor, start: Tensor, count: Tensor, scale: int, *, T: int,
    offset: int, pdl: bool,
) -> None:  # fmt: skip
    """Run x_proj of native Mamba-1; see `kernels.decode.reference.recurrent.mamba1_low`."""
    batch, slots, channels = mixed.shape
    at = start[:, None] + offset + torch.arange(T, device=start.device)  # [B, T]
    rows = at % slots + slots * torch.arange(batch, device=start.device)[:, None]
    y = torch.mm(mixed.view(-1, channels).index_select(0, rows.view(-1)), w.T)  # [M, J]
    M, J = y.shape
    _ring_kernel[(triton.cdiv(J, BLOCK), M)](
        y, J, y, 0, 0.0, y, y, low, start, count, J, T, offset, scale, 0, J, D=1, TILES=0,
        SLOTS=slots, BIAS=False, BLOCK=BLOCK, PDL=pdl, **launch_options(pdl, num_warps=4),
    )  # fmt: skip


def project_qkv(
    scaled: Tensor, squares: Tensor, eps: float, w: Matrix, bias: Tensor | None, cos: Tensor,
    sin: Tensor, q: Tensor, keys: Tensor, values: Tensor, start: Tensor, count: Tensor, scale: int,
    *, T: int, offset: int, sinks: int = 0, ring: int = 0, pdl: bool,
) -> None:  # fmt: skip
    """Write queries, keys and values; see `kernels.decode.reference.linear.project_qkv`."""
    _put_heads(
        _times(scaled, w), squares, eps, bias, cos, sin, q, keys, values=values, start=start,
        count=count, scale=scale, T=T, offset=offset, sinks=sinks, ring=ring,
        depth=scaled.shape[1], pdl=pdl,
    )  # fmt: skip


def _put_heads(
    y: Tensor, squares: Tensor, eps: float, bias: Tensor | None, cos: Tensor, sin: Tensor,
    q: Tensor, keys: Tensor, values: Tensor, start: Tensor, count: Tensor, scale: int, *, T: int,
    offset: int, sinks: int, ring: int, depth: int, pdl: bool,
) -> None:  # fmt: skip
    """Norm, rotate and store products y [M, (H + 2 Hk) P] of `depth` terms each."""
    (M, N), (_, kv_heads, slots, width) = y.shape, keys.shape
    _rope_kernel[(N // width, M)](
        y, y.stride(0), squares, squares.stride(0), eps, y if bias is None else bias, cos, sin, q,
        keys, values, start, count, T, offset, scale, slots, BIAS=bias is not None,
        H=q.shape[1] // width, HK=kv_heads, P=width, SINKS=sinks, RING=ring,
        HALF=triton.next_power_of_2(width // 2),
        **_common(squares, depth, pdl) | launch_options(pdl, num_warps=1),
    )  # fmt: skip


def add_residual(
    x: Tensor, w: Matrix, bias: Tensor | None, hidden: Tensor, gain: Tensor, scaled: Tensor,
    squares: Tensor, beside: Sequence[tuple[Tensor, Matrix]] = (), *, pdl: bool,
) -> None:  # fmt: skip
    """Add an output projection; see `kernels.decode.reference.linear.add_residual`."""
    M, N = hidden.shape
    y = _times(x, w)  # [M, N]
    for other, weight in beside:
        y = _times(other, weight, y)
    _stream_kernel[(M,)](
        y, y if bias is None else bias, hidden, gain, scaled, squares, squares.stride(0), N,
        BIAS=bias is not None, BLOCK=min(4096, triton.next_power_of_2(N)),
        TILES=squares.shape[1], PDL=pdl, **launch_options(pdl, num_warps=8),
    )  # fmt: skip


def swiglu(
    scaled: Tensor, squares: Tensor, eps: float, w: Matrix, out: Tensor, *, pdl: bool
) -> None:
    """Compute the first half of an MLP; see `kernels.decode.reference.linear.swiglu`."""
    (M, D), N = scaled.shape, out.shape[1]
    y = _times(scaled, w)  # [M, 2 I]
    _swiglu_kernel[(triton.cdiv(N, BLOCK), M)](
        y, squares, squares.stride(0), eps, out, N, BLOCK=BLOCK, **_common(squares, D, pdl)
    )


def head(
    scaled: Tensor, squares: Tensor, eps: float, w: Tensor, best: Tensor | None,
    best_index: Tensor | None, logits: Tensor | None, *, pdl: bool,
) -> None:  # fmt: skip
    """Compute logits or their best tokens; see `kernels.decode.triton.linear.head`."""
    (M, D), N = scaled.shape, w.shape[0]
    if scaled.is_cuda and scaled.dtype != torch.float32:
        y = torch.mm(scaled, w.T, out_dtype=torch.float32)  # [M, V]
    else:
        y = torch.mm(scaled.float(), w.float().T)
    sizes = {"BLOCK": BLOCK, **_common(squares, D, pdl)}
    if logits is None:
        pieces = present(best).shape[1]
        _best_kernel[(pieces, M)](
            y, squares, squares.stride(0), eps, best, best_index, N, pieces, **sizes
        )
        return
    V = logits.shape[1]
    _logits_kernel[(triton.cdiv(V, BLOCK), M)](
        y, squares, squares.stride(0), eps, logits, N, V, **sizes
    )
