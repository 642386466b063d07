"""The matrix products of a decode pass with what surrounds them fused in.

`scaled` [M, K] is the residual stream times the next norm's weight and `squares` [M, tiles] holds
partial sums of the stream's squares, so RMSNorm needs no kernel: a product multiplies its result
by rsqrt(mean + eps). Signatures and meaning are those of `kernels.decode.reference.linear`.
"""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from mambactl.kernels.byte_matrix import Matrix
from mambactl.kernels.decode.operations import AttentionArguments
from mambactl.kernels.decode.triton.decode_attention import slot_of
from mambactl.kernels.decode.triton.gemv import (
    Tiles,
    add_product,
    first_tile,
    input_factor,
    no_sums,
    norm_rate,
    operand,
    product,
    rescale,
    scaled_sums,
    square_parts,
    whole_sums,
)
from mambactl.kernels.decode.triton.taps import add_tap, behind, tap
from mambactl.kernels.launch import gdc_wait, launch_options, rounded


@triton.jit
def _normed_product(
    x, x_stride, squares, s_stride, eps, w, w_scale, first, bias, rows, M, index, ok,
    K: tl.constexpr, TILES: tl.constexpr, BIAS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    DEPTH: tl.constexpr, SLICES: tl.constexpr,
):  # fmt: skip
    """norm(x) W^T + bias [BM, BN] in fp32; TILES = 0 leaves the norm out."""
    rate = tl.full([BM], 1.0, tl.float32)
    if TILES > 0:
        parts = square_parts(squares, s_stride, rows, rows < M, TILES)
        if w.dtype.element_ty.primitive_bitwidth == 8:
            rate = norm_rate(parts, eps, K)
    factor = input_factor(w, rate, SLICES)
    y = product(
        x, x_stride, w, w_scale, first, factor, rows, M, index, ok, K, BM, BN, DEPTH, SLICES
    )
    if TILES > 0:
        y = y * norm_rate(parts, eps, K)[:, None]
    if BIAS:
        y += tl.load(bias + index, mask=ok, other=0.0).to(tl.float32)[None, :]
    return y


@triton.jit
def _angles(cos, sin, at, j, ok, P: tl.constexpr):
    """Cosines and sines [BM, pairs] of rows at positions `at`; those of no rotation elsewhere."""
    angle = at[:, None] * (P // 2) + j[None, :]
    c = tl.load(cos + angle, mask=ok[:, None], other=1.0)
    s = tl.load(sin + angle, mask=ok[:, None], other=0.0)
    return c, s


@triton.jit
def _head_columns(piece, BN: tl.constexpr, P: tl.constexpr):
    """Head of a program, its first pair and its columns: pairs (j, j + P/2), which rotations mix.

    `piece` numbers the programs of queries, keys and values.
    """
    head = piece * BN // P
    corner = (piece * BN % P) // 2
    pairs = tl.arange(0, BN)
    return head, corner, head * P + corner + pairs // 2 + pairs % 2 * (P // 2)


@triton.jit
def _put_heads(
    y, c, s, head, j, rows, b, at, ok, q, keys, values, slots,
    H: tl.constexpr, HK: tl.constexpr, P: tl.constexpr, SINKS: tl.constexpr, RING: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Rotate pairs y [BM, BN] of one head and store them to q or a cache."""
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


@triton.jit(do_not_specialize=["M", "T", "offset", "scale"])
def _project_kernel(
    x, x_stride, squares, s_stride, eps, w, w_scale, bias, plain, ring, conv_weight, conv_bias,
    mixed, start, count, M, N, T, offset, scale, ring_lo, ring_hi, conv_width,
    cos, sin, q0, keys0, values0, slots0, q1, keys1, values1, slots1,
    K: tl.constexpr, TILES: tl.constexpr, SLOTS: tl.constexpr, BIAS: tl.constexpr,
    CONV: tl.constexpr, SINGLE: tl.constexpr, P: tl.constexpr, H0: tl.constexpr, HK0: tl.constexpr,
    SINKS0: tl.constexpr, RING0: tl.constexpr, H1: tl.constexpr, HK1: tl.constexpr,
    SINKS1: tl.constexpr, RING1: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    DEPTH: tl.constexpr, SLICES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    # programs of the recurrence, then those of the heads of up to two attentions (H0 = 0: none)
    pid, pieces = tl.program_id(0), tl.cdiv(N, BN)
    ours = pid < pieces
    cols = pid * BN + tl.arange(0, BN)
    col_ok = cols < N
    rows = tl.arange(0, BM)
    if H0 > 0:
        head, corner, columns = _head_columns(tl.maximum(pid - pieces, 0), BN, P)
        cols = tl.where(ours, cols, N + columns)
        col_ok = col_ok | (pid >= pieces)
    first = first_tile(w, cols, col_ok, K, BN, DEPTH, SLICES, PDL)
    # where sequences stand does not change within a step
    b, t = rows // T, rows % T
    at = tl.load(start + b, mask=rows < M, other=0) + offset + t
    kept = (t < tl.load(count + b, mask=rows < M, other=0) * scale) & (at >= 0) & (rows < M)
    width = ring_hi - ring_lo
    ch = cols - ring_lo
    inside = (ch >= 0) & (ch < width)
    ringed = col_ok[None, :] & inside[None, :] & kept[:, None]
    if CONV:
        convolved = (ch >= 0) & (ch < conv_width)
        w0, w1 = tap(conv_weight, ch, convolved, 0), tap(conv_weight, ch, convolved, 1)
        w2, w3 = tap(conv_weight, ch, convolved, 2), tap(conv_weight, ch, convolved, 3)
        shift = tl.load(conv_bias + ch, mask=convolved, other=0.0).to(tl.float32)
    if H0 > 0:
        j = corner + tl.arange(0, BN // 2)
        local = tl.where(head < H0 + 2 * HK0, head, head - H0 - 2 * HK0)
        rotates = local < tl.where(head < H0 + 2 * HK0, H0 + HK0, H1 + HK1)
        c, s = _angles(cos, sin, at, j, kept & rotates & (pid >= pieces), P)
    if PDL:
        gdc_wait()
    if CONV and SINGLE:
        # what comes before a lone row is there already
        x0 = behind(ring, width, b, at, ch, ringed, 3, SLOTS)
        x1 = behind(ring, width, b, at, ch, ringed, 2, SLOTS)
        x2 = behind(ring, width, b, at, ch, ringed, 1, SLOTS)
    y = _normed_product(
        x, x_stride, squares, s_stride, eps, w, w_scale, first, bias, rows, M, cols, col_ok,
        K, TILES, BIAS, BM, BN, DEPTH, SLICES,
    )  # fmt: skip
    if H0 > 0:  # noqa: SIM102  the compiler knows the one condition, the GPU the other
        if pid >= pieces:
            if head < H0 + 2 * HK0:
                _put_heads(
                    y, c, s, local, j, rows, b, at, kept, q0, keys0, values0, slots0,
                    H0, HK0, P, SINKS0, RING0, BM, BN,
                )  # fmt: skip
            elif H1 > 0:
                _put_heads(
                    y, c, s, local, j, rows, b, at, kept, q1, keys1, values1, slots1,
                    H1, HK1, P, SINKS1, RING1, BM, BN,
                )  # fmt: skip
    y = rounded(y, plain.dtype.element_ty)
    slots = (b * SLOTS + at % SLOTS).to(tl.int64) * width
    tl.store(ring + slots[:, None] + ch[None, :], y, mask=ringed)
    rest = tl.where(cols >= ring_hi, cols - width, cols)
    elements = rows[:, None].to(tl.int64) * (N - width) + rest[None, :]
    outside = (cols < N) & (inside == 0)
    tl.store(plain + elements, y, mask=(rows < M)[:, None] & outside[None, :])
    if CONV:
        if not SINGLE:
            tl.debug_barrier()
            x0 = behind(ring, width, b, at, ch, ringed, 3, SLOTS)
            x1 = behind(ring, width, b, at, ch, ringed, 2, SLOTS)
            x2 = behind(ring, width, b, at, ch, ringed, 1, SLOTS)
        # in a fixed order, whatever the compiler would fuse
        total = add_tap(x0, w0, tl.broadcast_to(shift[None, :], [BM, BN]))
        total = add_tap(y.to(tl.float32), w3, add_tap(x2, w2, add_tap(x1, w1, total)))
        slots = (b * SLOTS + at % SLOTS).to(tl.int64) * conv_width
        out = rounded(total * tl.sigmoid(total), mixed.dtype.element_ty)
        tl.store(mixed + slots[:, None] + ch[None, :], out, mask=ringed & convolved[None, :])


@triton.jit(do_not_specialize=["M"])
def _residual_kernel(
    x, w, s, x1, w1, s1, x2, w2, s2, bias, hidden, gain, scaled, squares, M, N,
    K: tl.constexpr, K1: tl.constexpr, K2: tl.constexpr, BIAS: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, DEPTH: tl.constexpr, SLICES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    cols = tl.program_id(0) * BN + tl.arange(0, BN)
    rows = tl.arange(0, BM)
    col_ok = cols < N
    weight = tl.load(gain + cols, mask=col_ok, other=0.0).to(tl.float32)
    first = first_tile(w, cols, col_ok, K, BN, DEPTH, SLICES, PDL)
    if K1 > 0:
        first1 = first_tile(w1, cols, col_ok, K1, BN, DEPTH, SLICES, False)
    if K2 > 0:
        first2 = first_tile(w2, cols, col_ok, K2, BN, DEPTH, SLICES, False)
    if PDL:
        gdc_wait()
    ok = (rows < M)[:, None] & col_ok[None, :]
    elements = rows[:, None].to(tl.int64) * N + cols[None, :]
    kind = hidden.dtype.element_ty
    before = tl.load(hidden + elements, mask=ok, other=0.0).to(tl.float32)
    # of a constant LLVM would multiply in fp16 instead, behind the conversion that overflows
    factor = input_factor(w, tl.where(rows < M, 1.0, 0.5), SLICES)
    one, two = no_sums(w, BM, BN, DEPTH, SLICES)
    one, two = add_product(
        one, two, x, K, w, first, factor, rows, M, cols, col_ok, K, BM, BN, DEPTH, SLICES
    )
    last = s
    if K1 > 0:
        one, two = rescale(one, two, w, s, s1, cols, col_ok, BM, SLICES)
        one, two = add_product(
            one, two, x1, K1, w1, first1, factor, rows, M, cols, col_ok, K1, BM, BN, DEPTH, SLICES
        )
        last = s1
    if K2 > 0:
        one, two = rescale(one, two, w, s1, s2, cols, col_ok, BM, SLICES)
        one, two = add_product(
            one, two, x2, K2, w2, first2, factor, rows, M, cols, col_ok, K2, BM, BN, DEPTH, SLICES
        )
        last = s2
    y = scaled_sums(whole_sums(one, two, BM, SLICES), w, last, factor, cols, col_ok)
    if BIAS:
        y += tl.load(bias + cols, mask=col_ok, other=0.0).to(tl.float32)[None, :]
    # rounded where a separate layer would round
    stream = rounded(before + rounded(y, kind).to(tl.float32), kind)
    wide = tl.where(ok, stream.to(tl.float32), 0.0)
    tl.store(hidden + elements, stream, mask=ok)
    tl.store(scaled + elements, rounded(wide * weight[None, :], kind), mask=ok)
    part = squares + rows * tl.num_programs(0) + tl.program_id(0)
    tl.store(part, tl.sum(wide * wide, axis=1), mask=rows < M)


@triton.jit(do_not_specialize=["M"])
def _swiglu_kernel(
    x, squares, eps, w, w_scale, out, M, N,
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
        x, K, squares, TILES, eps, w, w_scale, first, x, rows, M, index, cols < N,
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
    x, squares, eps, w, w_scale, bias, cos, sin, q, keys, values, start, count, M, T, offset, scale,
    slots,
    K: tl.constexpr, TILES: tl.constexpr, BIAS: tl.constexpr, H: tl.constexpr, HK: tl.constexpr,
    P: tl.constexpr, SINKS: tl.constexpr, RING: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    DEPTH: tl.constexpr, SLICES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    head, corner, cols = _head_columns(tl.program_id(0), BN, P)
    rows = tl.arange(0, BM)
    first = first_tile(w, cols, cols >= 0, K, BN, DEPTH, SLICES, PDL)
    # where sequences stand does not change within a step
    b, t = rows // T, rows % T
    at = tl.load(start + b, mask=rows < M, other=0) + offset + t
    ok = (rows < M) & (at >= 0) & (t < tl.load(count + b, mask=rows < M, other=0) * scale)
    j = corner + tl.arange(0, BN // 2)
    c, s = _angles(cos, sin, at, j, ok & (head < H + HK), P)
    if PDL:
        gdc_wait()
    y = _normed_product(
        x, K, squares, TILES, eps, w, w_scale, first, bias, rows, M, cols, cols >= 0,
        K, TILES, BIAS, BM, BN, DEPTH, SLICES,
    )  # fmt: skip
    _put_heads(
        y, c, s, head, j, rows, b, at, ok, q, keys, values, slots, H, HK, P, SINKS, RING, BM, BN
    )


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
        x, x_stride, squares, s_stride, eps, w, w, first, x, rows, M, cols, cols < N,
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
    scaled: Tensor, squares: Tensor, eps: float, w: Matrix, bias: Tensor | None, plain: Tensor,
    ring: Tensor, start: Tensor, count: Tensor, scale: int, *, T: int, offset: int, ring_lo: int,
    conv: tuple[Tensor, Tensor, Tensor] | None = None,
    rotation: tuple[Tensor, Tensor] | None = None, beside: Sequence[AttentionArguments] = (),
    tiles: Tiles, pdl: bool,
) -> None:  # fmt: skip
    """Run `kernels.decode.reference.linear.project` with up to two attentions `beside`.

    Their head width must be a multiple of tiles.columns.
    """
    (M, K), (_, slots, width) = scaled.shape, ring.shape
    head_rows = sum(args.rows for args in beside)
    N = w.shape[0] - head_rows
    programs = triton.cdiv(N, tiles.columns) + head_rows // tiles.columns
    w, w_scale = operand(w)
    pointers, sizes = _head_arguments(beside, w)
    _project_kernel[(programs,)](
        scaled, scaled.stride(0), squares, squares.stride(0), eps, w, w_scale,
        w if bias is None else bias, plain, ring, *(conv or (w, w, w)), start, count, M, N, T,
        offset, scale, ring_lo, ring_lo + width, conv[2].shape[2] if conv else 0,
        *(rotation or (w, w)), *pointers,
        K=K, TILES=squares.shape[1], SLOTS=slots, BIAS=bias is not None, CONV=conv is not None,
        SINGLE=T == 1, **sizes, **_sizes(tiles, pdl),
    )  # fmt: skip


def _head_arguments(
    beside: Sequence[AttentionArguments], unused: Tensor
) -> tuple[list[Tensor | int], dict[str, int]]:
    """Arguments of `_project_kernel` about two attentions, and the sizes of those that are there.

    `unused` stands for the tensors of one that is not.
    """
    pointers: list[Tensor | int] = []
    sizes = {"P": beside[0].keys.shape[3] if beside else 2}
    for number in range(2):
        args = beside[number] if number < len(beside) else None
        if args is None:
            pointers += [unused, unused, unused, 0]
        else:
            pointers += [args.q, args.keys, args.values, args.keys.shape[2]]
        own = args.shape if args else (0, 0, 0, 0)
        names = ("H", "HK", "SINKS", "RING")
        sizes |= {f"{name}{number}": size for name, size in zip(names, own, strict=True)}
    return pointers, sizes


def project_qkv(
    scaled: Tensor, squares: Tensor, eps: float, w: Matrix, bias: Tensor | None, cos: Tensor,
    sin: Tensor, q: Tensor, keys: Tensor, values: Tensor, start: Tensor, count: Tensor, scale: int,
    *, T: int, offset: int, sinks: int = 0, ring: int = 0, tiles: Tiles, pdl: bool,
) -> None:  # fmt: skip
    """Write queries, keys and values; see `kernels.decode.reference.linear.project_qkv`.

    The head width must be a multiple of tiles.columns.
    """
    (M, K), (_, kv_heads, slots, width) = scaled.shape, keys.shape
    w, w_scale = operand(w)
    _qkv_kernel[(w.shape[0] // tiles.columns,)](
        scaled, squares, eps, w, w_scale, w if bias is None else bias, cos, sin, q, keys, values,
        start, count, M, T, offset, scale, slots, K=K, TILES=squares.shape[1],
        BIAS=bias is not None, H=q.shape[1] // width, HK=kv_heads, P=width, SINKS=sinks, RING=ring,
        **_sizes(tiles, pdl),
    )  # fmt: skip


def add_residual(
    x: Tensor, w: Matrix, bias: Tensor | None, hidden: Tensor, gain: Tensor, scaled: Tensor,
    squares: Tensor, beside: Sequence[tuple[Tensor, Matrix]] = (), *, tiles: Tiles, pdl: bool,
) -> None:  # fmt: skip
    """Run `kernels.decode.reference.linear.add_residual`; a piece of `squares` for each program."""
    (M, K), N = x.shape, w.shape[0]
    absent = 2 - len(beside)
    depths = [other.shape[1] for other, _ in beside] + [0] * absent
    every = ((x, w), *beside, *[(x, w)] * absent)
    operands = [tensor for other, matrix in every for tensor in (other, *operand(matrix))]
    _residual_kernel[(triton.cdiv(N, tiles.columns),)](
        *operands, gain if bias is None else bias, hidden, gain, scaled, squares, M, N,
        K=K, K1=depths[0], K2=depths[1], BIAS=bias is not None, **_sizes(tiles, pdl),
    )  # fmt: skip


def swiglu(
    scaled: Tensor, squares: Tensor, eps: float, w: Matrix, out: Tensor, *, tiles: Tiles, pdl: bool
) -> None:
    """Compute the first half of an MLP; see `kernels.decode.reference.linear.swiglu`."""
    (M, K), N = scaled.shape, out.shape[1]
    _swiglu_kernel[(triton.cdiv(2 * N, tiles.columns),)](
        scaled, squares, eps, *operand(w), out, M, N, K=K, TILES=squares.shape[1],
        **_sizes(tiles, pdl),
    )  # fmt: skip


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
