"""The matrix products of a decode pass with what surrounds them fused in.

`scaled` [M, K] is the residual stream times the next norm's weight and `squares` [M, tiles] holds
partial sums of the stream's squares, so RMSNorm needs no kernel: a product multiplies its result
by rsqrt(mean + eps). Signatures and meaning are those of `kernels.decode.reference.linear`.
"""

import triton
import triton.language as tl
from torch import Tensor

from mambactl.kernels.decode.triton.decode_attention import slot_of
from mambactl.kernels.decode.triton.gemv import Tiles, first_tile, norm_rate, product, square_parts
from mambactl.kernels.launch import gdc_launch_dependents, gdc_wait, launch_options, rounded


@triton.jit
def _normed_product(
    x, x_stride, squares, s_stride, eps, w, first, bias, rows, M, index, ok,
    K: tl.constexpr, TILES: tl.constexpr, BIAS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, DEPTH: tl.constexpr,
    SLICES: tl.constexpr,
):  # fmt: skip
    """norm(x) W^T + bias [BM, BN] in fp32; TILES = 0 leaves the norm out."""
    if TILES > 0:
        parts = square_parts(squares, s_stride, rows, rows < M, TILES)
    y = product(x, x_stride, w, first, rows, M, index, ok, K, BM, BN, DEPTH, SLICES)
    if TILES > 0:
        y = y * norm_rate(parts, eps, K)[:, None]
    if BIAS:
        y += tl.load(bias + index, mask=ok, other=0.0).to(tl.float32)[None, :]
    return y


@triton.jit
def _tap(weight, ch, ok, i: tl.constexpr):
    return tl.load(weight + ch * 4 + i, mask=ok, other=0.0).to(tl.float32)


@triton.jit
def _add_tap(x, w, total):
    return tl.fma(x, tl.broadcast_to(w[None, :], x.shape), total)


@triton.jit
def _behind(ring, width, b, at, ch, ok, back: tl.constexpr, SLOTS: tl.constexpr):
    """Raw rows [BM, BN] `back` positions before `at`; zeros before position 0."""
    earlier = at - back
    rows = (b * SLOTS + (earlier + SLOTS) % SLOTS).to(tl.int64) * width
    return tl.load(
        ring + rows[:, None] + ch[None, :],
        mask=ok & (earlier >= 0)[:, None],
        other=0.0,
        cache_modifier=".cg",
    ).to(tl.float32)


@triton.jit(do_not_specialize=["M", "T", "offset", "scale"])
def _project_kernel(
    x, x_stride, squares, s_stride, eps, w, bias, plain, ring, conv_weight, conv_bias, mixed,
    start, count, M, N, T, offset, scale, ring_lo, ring_hi, conv_width,
    K: tl.constexpr, TILES: tl.constexpr, SLOTS: tl.constexpr, BIAS: tl.constexpr,
    CONV: tl.constexpr, SINGLE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    DEPTH: tl.constexpr, SLICES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    cols = tl.program_id(0) * BN + tl.arange(0, BN)
    rows = tl.arange(0, BM)
    first = first_tile(w, cols, cols < N, K, BN, DEPTH, SLICES, PDL)
    # where sequences stand does not change within a step
    b, t = rows // T, rows % T
    at = tl.load(start + b, mask=rows < M, other=0) + offset + t
    kept = (t < tl.load(count + b, mask=rows < M, other=0) * scale) & (at >= 0)
    ok = (rows < M)[:, None] & (cols < N)[None, :]
    width = ring_hi - ring_lo
    ch = cols - ring_lo
    inside = (ch >= 0) & (ch < width)
    ringed = ok & inside[None, :] & kept[:, None]
    if CONV:
        convolved = (ch >= 0) & (ch < conv_width)
        w0, w1 = _tap(conv_weight, ch, convolved, 0), _tap(conv_weight, ch, convolved, 1)
        w2, w3 = _tap(conv_weight, ch, convolved, 2), _tap(conv_weight, ch, convolved, 3)
        shift = tl.load(conv_bias + ch, mask=convolved, other=0.0).to(tl.float32)
    if PDL:
        gdc_wait()
    if CONV and SINGLE:
        # what comes before a lone row is there already
        x0 = _behind(ring, width, b, at, ch, ringed, 3, SLOTS)
        x1 = _behind(ring, width, b, at, ch, ringed, 2, SLOTS)
        x2 = _behind(ring, width, b, at, ch, ringed, 1, SLOTS)
    y = _normed_product(
        x, x_stride, squares, s_stride, eps, w, first, bias, rows, M, cols, cols < N,
        K, TILES, BIAS, BM, BN, DEPTH, SLICES,
    )  # fmt: skip
    y = rounded(y, plain.dtype.element_ty)
    slots = (b * SLOTS + at % SLOTS).to(tl.int64) * width
    tl.store(ring + slots[:, None] + ch[None, :], y, mask=ringed)
    rest = tl.where(cols >= ring_hi, cols - width, cols)
    elements = rows[:, None].to(tl.int64) * (N - width) + rest[None, :]
    tl.store(plain + elements, y, mask=ok & (inside[None, :] == 0))
    if CONV:
        if not SINGLE:
            tl.debug_barrier()
            x0 = _behind(ring, width, b, at, ch, ringed, 3, SLOTS)
            x1 = _behind(ring, width, b, at, ch, ringed, 2, SLOTS)
            x2 = _behind(ring, width, b, at, ch, ringed, 1, SLOTS)
        # in a fixed order, whatever the compiler would fuse
        total = _add_tap(x0, w0, tl.broadcast_to(shift[None, :], [BM, BN]))
        total = _add_tap(y.to(tl.float32), w3, _add_tap(x2, w2, _add_tap(x1, w1, total)))
        slots = (b * SLOTS + at % SLOTS).to(tl.int64) * conv_width
        out = rounded(total * tl.sigmoid(total), mixed.dtype.element_ty)
        tl.store(mixed + slots[:, None] + ch[None, :], out, mask=ringed & convolved[None, :])


@triton.jit(do_not_specialize=["M"])
def _residual_kernel(
    x, w, bias, hidden, gain, scaled, squares, M, N,
    K: tl.constexpr, BIAS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    DEPTH: tl.constexpr, SLICES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    cols = tl.program_id(0) * BN + tl.arange(0, BN)
    rows = tl.arange(0, BM)
    col_ok = cols < N
    weight = tl.load(gain + cols, mask=col_ok, other=0.0).to(tl.float32)
    first = first_tile(w, cols, col_ok, K, BN, DEPTH, SLICES, PDL)
    if PDL:
        gdc_wait()
    ok = (rows < M)[:, None] & col_ok[None, :]
    elements = rows[:, None].to(tl.int64) * N + cols[None, :]
    kind = hidden.dtype.element_ty
    before = tl.load(hidden + elements, mask=ok, other=0.0).to(tl.float32)
    y = _normed_product(
        x, K, x, 0, 0.0, w, first, bias, rows, M, cols, col_ok,
        K, 0, BIAS, BM, BN, DEPTH, SLICES,
    )  # fmt: skip
    # rounded where a separate layer would round
    stream = rounded(before + rounded(y, kind).to(tl.float32), kind)
    wide = tl.where(ok, stream.to(tl.float32), 0.0)
    tl.store(hidden + elements, stream, mask=ok)
    tl.store(scaled + elements, rounded(wide * weight[None, :], kind), mask=ok)
    part = squares + rows * tl.num_programs(0) + tl.program_id(0)
    tl.store(part, tl.sum(wide * wide, axis=1), mask=rows < M)


@triton.jit(do_not_specialize=["M"])
def _swiglu_kernel(
    x, squares, eps, w, out, M, N,
    K: tl.constexpr, TILES: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    DEPTH: tl.constexpr, SLICES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    rows, pairs = tl.arange(0, BM), tl.arange(0, BN)
    cols = tl.program_id(0) * (BN // 2) + pairs // 2
    index = cols + pairs % 2 * N
    first = first_tile(w, index, cols < N, K, BN, DEPTH, SLICES, PDL)
    if PDL:
        gdc_wait()
    y = _normed_product(
        x, K, squares, TILES, eps, w, first, x, rows, M, index, cols < N,
        K, TILES, False, BM, BN, DEPTH, SLICES,
    )  # fmt: skip
    gate, up = tl.split(tl.reshape(y, [BM, BN // 2, 2]))
    kind = out.dtype.element_ty
    # rounded where separate layers would round
    gate, up = rounded(gate, kind).to(tl.float32), rounded(up, kind).to(tl.float32)
    opened = rounded(gate * tl.sigmoid(gate), kind).to(tl.float32)
    half = tl.program_id(0) * (BN // 2) + tl.arange(0, BN // 2)
    elements = rows[:, None].to(tl.int64) * N + half[None, :]
    tl.store(out + elements, rounded(opened * up, kind),
             mask=(rows < M)[:, None] & (half < N)[None, :])  # fmt: skip


@triton.jit(do_not_specialize=["M", "T", "offset", "scale"])
def _qkv_kernel(
    x, squares, eps, w, bias, cos, sin, q, keys, values, start, count, M, T, offset, scale, slots,
    K: tl.constexpr, TILES: tl.constexpr, BIAS: tl.constexpr, H: tl.constexpr, HK: tl.constexpr,
    P: tl.constexpr, SINKS: tl.constexpr, RING: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    DEPTH: tl.constexpr, SLICES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    # a program holds pairs (j, j + P/2) of one head, which a rotation mixes
    pid = tl.program_id(0)
    head = pid * BN // P
    pairs = tl.arange(0, BN)
    corner = (pid * BN % P) // 2
    cols = head * P + corner + pairs // 2 + pairs % 2 * (P // 2)
    rows = tl.arange(0, BM)
    first = first_tile(w, cols, pairs < BN, K, BN, DEPTH, SLICES, PDL)
    # where sequences stand does not change within a step
    b, t = rows // T, rows % T
    at = tl.load(start + b, mask=rows < M, other=0) + offset + t
    ok = (rows < M) & (at >= 0) & (t < tl.load(count + b, mask=rows < M, other=0) * scale)
    j = corner + tl.arange(0, BN // 2)
    angle = at[:, None] * (P // 2) + j[None, :]
    rotated = (head < H + HK) & ok[:, None]
    c = tl.load(cos + angle, mask=rotated, other=1.0)
    s = tl.load(sin + angle, mask=rotated, other=0.0)
    if PDL:
        gdc_wait()
    y = _normed_product(
        x, K, squares, TILES, eps, w, first, bias, rows, M, cols, pairs < BN,
        K, TILES, BIAS, BM, BN, DEPTH, SLICES,
    )  # fmt: skip
    kind = q.dtype.element_ty
    low, high = tl.split(tl.reshape(rounded(y, kind).to(tl.float32), [BM, BN // 2, 2]))
    low, high = low * c - high * s, high * c + low * s
    slot = slot_of(at, SINKS, RING)
    if head < H:
        base = q + (rows * H + head).to(tl.int64) * P
    elif head < H + HK:
        base = keys + ((b * HK + head - H).to(tl.int64) * slots + slot) * P
    else:
        base = values + ((b * HK + head - H - HK).to(tl.int64) * slots + slot) * P
    pointers = base[:, None] + j[None, :]
    tl.store(pointers, rounded(low, kind), mask=ok[:, None])
    tl.store(pointers + P // 2, rounded(high, kind), mask=ok[:, None])


@triton.jit(do_not_specialize=["M"])
def _head_kernel(
    x, x_stride, squares, s_stride, eps, w, best, best_index, logits, M, N, V,
    K: tl.constexpr, TILES: tl.constexpr, LOGITS: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, DEPTH: tl.constexpr, SLICES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    cols = tl.program_id(0) * BN + tl.arange(0, BN)
    rows = tl.arange(0, BM)
    first = first_tile(w, cols, cols < N, K, BN, DEPTH, SLICES, PDL)
    if PDL:
        gdc_wait()
    y = _normed_product(
        x, x_stride, squares, s_stride, eps, w, first, x, rows, M, cols, cols < N,
        K, TILES, False, BM, BN, DEPTH, SLICES,
    )  # fmt: skip
    y = tl.where((cols < N)[None, :], y, float("-inf"))
    if LOGITS:
        elements = rows[:, None].to(tl.int64) * V + cols[None, :]
        tl.store(logits + elements, y, mask=(rows < M)[:, None] & (cols < V)[None, :])
    else:
        top = tl.max(y, axis=1)
        # the lowest of equal tokens
        which = tl.min(tl.where(y == top[:, None], cols[None, :], 2147483647), axis=1)
        element = rows * tl.num_programs(0) + tl.program_id(0)
        tl.store(best + element, top, mask=rows < M)
        tl.store(best_index + element, which, mask=rows < M)


def _sizes(tiles: Tiles, pdl: bool) -> dict:
    return {
        "BM": tiles.rows, "BN": tiles.columns, "DEPTH": tiles.depth, "SLICES": tiles.slices,
        "PDL": pdl,
        **launch_options(pdl and tiles.early, num_warps=tiles.warps, num_stages=tiles.stages),
    }  # fmt: skip


def project(
    scaled: Tensor, squares: Tensor, eps: float, w: Tensor, bias: Tensor | None, plain: Tensor,
    ring: Tensor, start: Tensor, count: Tensor, scale: int, *, T: int, offset: int, ring_lo: int,
    conv: tuple[Tensor, Tensor, Tensor] | None = None, tiles: Tiles, pdl: bool,
) -> None:  # fmt: skip
    """See `kernels.decode.reference.linear.project`."""
    (M, K), N, (_, slots, width) = scaled.shape, w.shape[0], ring.shape
    _project_kernel[(triton.cdiv(N, tiles.columns),)](
        scaled, scaled.stride(0), squares, squares.stride(0), eps, w, w if bias is None else bias,
        plain, ring, *(conv or (w, w, w)), start, count, M, N, T, offset, scale, ring_lo,
        ring_lo + width, conv[2].shape[2] if conv else 0, K=K, TILES=squares.shape[1],
        SLOTS=slots, BIAS=bias is not None, CONV=conv is not None, SINGLE=T == 1,
        **_sizes(tiles, pdl),
    )  # fmt: skip


def project_qkv(
    scaled: Tensor, squares: Tensor, eps: float, w: Tensor, bias: Tensor | None, cos: Tensor,
    sin: Tensor, q: Tensor, keys: Tensor, values: Tensor, start: Tensor, count: Tensor, scale: int,
    *, T: int, offset: int, sinks: int = 0, ring: int = 0, tiles: Tiles, pdl: bool,
) -> None:  # fmt: skip
    """See `kernels.decode.reference.linear.project_qkv`.

    The head width must be a multiple of tiles.columns.
    """
    (M, K), (_, kv_heads, slots, width) = scaled.shape, keys.shape
    _qkv_kernel[(w.shape[0] // tiles.columns,)](
        scaled, squares, eps, w, w if bias is None else bias, cos, sin, q, keys, values, start,
        count, M, T, offset, scale, slots, K=K, TILES=squares.shape[1], BIAS=bias is not None,
        H=q.shape[1] // width, HK=kv_heads, P=width, SINKS=sinks, RING=ring, **_sizes(tiles, pdl),
    )  # fmt: skip


def add_residual(
    x: Tensor, w: Tensor, bias: Tensor | None, hidden: Tensor, gain: Tensor, scaled: Tensor,
    squares: Tensor, *, tiles: Tiles, pdl: bool,
) -> None:  # fmt: skip
    """See `kernels.decode.reference.linear.add_residual`; a piece of `squares` for each program."""
    (M, K), N = x.shape, w.shape[0]
    _residual_kernel[(triton.cdiv(N, tiles.columns),)](
        x, w, w if bias is None else bias, hidden, gain, scaled, squares, M, N,
        K=K, BIAS=bias is not None, **_sizes(tiles, pdl),
    )  # fmt: skip


def swiglu(
    scaled: Tensor, squares: Tensor, eps: float, w: Tensor, out: Tensor, *, tiles: Tiles, pdl: bool
) -> None:
    """See `kernels.decode.reference.linear.swiglu`."""
    (M, K), N = scaled.shape, out.shape[1]
    _swiglu_kernel[(triton.cdiv(2 * N, tiles.columns),)](
        scaled, squares, eps, w, out, M, N, K=K, TILES=squares.shape[1], **_sizes(tiles, pdl)
    )


def head(
    scaled: Tensor, squares: Tensor, eps: float, w: Tensor, best: Tensor | None,
    best_index: Tensor | None, logits: Tensor | None, *, tiles: Tiles, pdl: bool,
) -> None:  # fmt: skip
    """`head_logits` where `logits` are given, else `head_best`, of the reference twin.

    The rows of `scaled` and `squares` may be any distance apart.
    """
    (M, K), N = scaled.shape, w.shape[0]
    V = N if logits is None else logits.shape[1]
    _head_kernel[(triton.cdiv(max(N, V), tiles.columns),)](
        scaled, scaled.stride(0), squares, squares.stride(0), eps, w,
        scaled if best is None else best, scaled if best_index is None else best_index,
        scaled if logits is None else logits, M, N, V,
        K=K, TILES=squares.shape[1], LOGITS=logits is not None, **_sizes(tiles, pdl),
    )  # fmt: skip


@triton.jit(do_not_specialize=["T"])
def _embed_kernel(
    tokens, row_stride, table, gain, hidden, scaled, squares, T, N, V, TILES: tl.constexpr,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
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
        value = stream.to(tl.float32)
        weight = tl.load(gain + cols, mask=ok, other=0.0).to(tl.float32)
        element = m.to(tl.int64) * N + cols
        tl.store(hidden + element, stream, mask=ok)
        tl.store(scaled + element, rounded(value * weight, stream.dtype), mask=ok)
        total += tl.sum(value * value)
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
    *, pdl: bool,
) -> None:  # fmt: skip
    """See `kernels.decode.reference.linear.embed`; tokens [B, T] may be a piece of wider rows."""
    M, N = hidden.shape
    _embed_kernel[(M,)](
        tokens, tokens.stride(0), table, gain, hidden, scaled, squares, tokens.shape[1], N,
        table.shape[0], TILES=squares.shape[1], BLOCK=min(4096, triton.next_power_of_2(N)),
        PDL=pdl, **launch_options(pdl, num_warps=8),
    )  # fmt: skip


def pick(best: Tensor, best_index: Tensor, tokens: Tensor, *, pdl: bool) -> None:
    """See `kernels.decode.reference.linear.pick`."""
    M, pieces = best.shape
    _pick_kernel[(M,)](
        best, best_index, tokens, tokens.stride(0), pieces,
        BLOCK=min(1024, triton.next_power_of_2(pieces)), PDL=pdl,
        **launch_options(pdl, num_warps=8),
    )  # fmt: skip
