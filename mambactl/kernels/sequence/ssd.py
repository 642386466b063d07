"""Mamba-2 over whole prompts (arXiv 2405.21060, section 6), parallel over chunks and heads.

Three launches: what every chunk adds to the state and how much it keeps of the one before; the
states, chunk after chunk; the outputs, as in attention but with decays for a softmax. The first
token of a document forgets everything, so documents need nothing else. Decays and running states
are fp32, sums of logarithms fp64 (after a token that forgets everything a difference of two sums
must stay exact), and no exponent is ever positive. Products take operands in the dtype of x; bf16
therefore rounds dt x, the scores and the entering state once each.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mambactl.kernels.launch import dot, launch_options, rounded

# exp of this is 0 in fp32, and a sum of any number of them is finite
FORGETS_ALL = tl.constexpr(-1e4)


class Blocks(NamedTuple):
    """Tokens per tile, and the largest tile of head dim and of state in either product."""

    tile: int
    chunk_p: int
    chunk_n: int
    output_p: int
    output_n: int
    state_n: int


BLOCKS = {
    torch.bfloat16: Blocks(64, 64, 128, 128, 128, 64),
    torch.float32: Blocks(32, 32, 64, 64, 32, 32),
}
PASS_BLOCK = 512


@triton.jit
def log_decays(step, rate, documents, t, ok, DOCUMENTS: tl.constexpr):
    """log of the decay [L] in fp64 for the tokens at t, and where it follows dt A."""
    logs = step * rate
    free = ok & (logs > FORGETS_ALL)
    if DOCUMENTS:
        later = ok & (t > 0)
        number = tl.load(documents + t, mask=later, other=0)
        free = free & (number == tl.load(documents + t - 1, mask=later, other=0))
    return tl.where(free | (ok == 0), logs, FORGETS_ALL).to(tl.float64), free


@triton.jit
def split(decay):
    """An fp64 sum of logarithms as two fp32 numbers, whose differences stay exact."""
    coarse = decay.to(tl.float32)
    return coarse, (decay - coarse.to(tl.float64)).to(tl.float32)


@triton.jit
def chunk_kernel(
    x, dt, A, B, documents, sums, kept, states, T, chunks, x_b, x_t, x_h, dt_b, dt_t, dt_h, k_b,
    k_t, k_g,
    H: tl.constexpr, P: tl.constexpr, N: tl.constexpr, XH: tl.constexpr, BG: tl.constexpr,
    CHUNK: tl.constexpr, TILE: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr,
    DOCUMENTS: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """Addition of a chunk to the state [P, N], and the fraction of the state that it keeps.

    BACKWARD: the addition to the gradient of the state that enters it, for the gradient of the
    outputs in place of x and C in place of B; a chunk must then be one tile. `sums` takes four fp32
    rows of it: the logarithms summed as `split` gives them, dt, and 1 where decays follow dt A.
    """
    parts_n: tl.constexpr = tl.cdiv(N, BN)
    parts: tl.constexpr = tl.cdiv(P, BP) * parts_n
    h, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    c, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    p = part // parts_n * BP + tl.arange(0, BP)
    n = part % parts_n * BN + tl.arange(0, BN)
    first = c * CHUNK
    begin = first.to(tl.int64)
    cell = (b * H + h) * chunks + c
    x += b * x_b + begin * x_t + h // (H // XH) * x_h
    B += b * k_b + begin * k_t + h // (H // BG) * k_g
    dt += b * dt_b + begin * dt_t + h * dt_h
    documents += b * T
    rate = tl.load(A + h)
    at = tl.arange(0, TILE)
    state = tl.zeros([BP, BN], tl.float32)
    before = tl.full([], 0.0, tl.float64)
    for s in range(0, tl.minimum(CHUNK, T - first), TILE):
        ok = first + s + at < T
        step = tl.load(dt + (s + at) * dt_t, mask=ok, other=0.0)  # [L]
        logs, free = log_decays(step, rate, documents, first + s + at, ok, DOCUMENTS)
        decay = tl.cumsum(logs, 0)
        total = tl.sum(logs, 0)
        if BACKWARD:
            coarse, fine = split(decay)
            weight = tl.exp(tl.minimum(coarse, 0.0))
            if part == 0:
                pointer = sums + cell * (4 * CHUNK) + at
                tl.store(pointer, coarse)
                tl.store(pointer + CHUNK, fine)
                tl.store(pointer + 2 * CHUNK, step)
                tl.store(pointer + 3 * CHUNK, free.to(tl.float32))
        else:
            weight = tl.exp(tl.minimum((total - decay).to(tl.float32), 0.0)) * step
            if part == 0:
                tl.store(sums + cell * CHUNK + s + at, before + decay)
        value = tl.load(
            x + (s + at)[:, None] * x_t + p[None, :],
            mask=ok[:, None] & (p < P)[None, :],
            other=0.0,
        )  # [L, P]
        key = tl.load(
            B + (s + at)[:, None] * k_t + n[None, :],
            mask=ok[:, None] & (n < N)[None, :],
            other=0.0,
        )  # [L, N]
        value = (value.to(tl.float32) * weight[:, None]).to(key.dtype)
        state = dot(tl.trans(value), key, state * tl.exp(total.to(tl.float32)))
        before += total
    if part == 0:
        tl.store(kept + cell, tl.exp(before.to(tl.float32)))
    pointer = states + cell * (P * N) + p[:, None] * N + n[None, :]
    tl.store(pointer, state, mask=(p < P)[:, None] & (n < N)[None, :])


@triton.jit
def pass_kernel(
    fresh, kept, initial, entering, final, chunks,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, INITIAL: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """The state before every chunk and after the last one; BACKWARD goes from the last chunk."""
    row = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ok = i < SIZE
    state = tl.zeros([BLOCK], tl.float32)
    if INITIAL:
        state = tl.load(initial + row * SIZE + i, mask=ok, other=0.0)
    begin = row * chunks
    ahead: tl.constexpr = -1 if BACKWARD else 1
    if BACKWARD:
        begin += chunks - 1
    fresh += begin * SIZE + i
    entering += begin * SIZE + i
    kept += begin
    # two chunks are always on their way
    add = tl.load(fresh, mask=ok, other=0.0)
    add_later = tl.load(fresh + ahead * SIZE, mask=ok & (chunks > 1), other=0.0)
    keep = tl.load(kept)
    keep_later = tl.load(kept + ahead, mask=chunks > 1, other=0.0)
    for c in range(chunks):
        add_last = tl.load(fresh + 2 * ahead * SIZE, mask=ok & (c + 2 < chunks), other=0.0)
        keep_last = tl.load(kept + 2 * ahead, mask=c + 2 < chunks, other=0.0)
        tl.store(entering, rounded(state, entering.dtype.element_ty), mask=ok)
        state = state * keep + add
        add, add_later, keep, keep_later = add_later, add_last, keep_later, keep_last
        fresh += ahead * SIZE
        entering += ahead * SIZE
        kept += ahead
    tl.store(final + row * SIZE + i, state, mask=ok)


@triton.jit
def _output_kernel(
    x, dt, B, C, sums, states, y, T, chunks, x_b, x_t, x_h, dt_b, dt_t, dt_h, k_b, k_t, k_g,
    q_b, q_t, q_g,
    H: tl.constexpr, P: tl.constexpr, N: tl.constexpr, XH: tl.constexpr, BG: tl.constexpr,
    CG: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr, BP: tl.constexpr,
    BN: tl.constexpr, SN: tl.constexpr,
):  # fmt: skip
    parts: tl.constexpr = tl.cdiv(P, BP)
    h, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    # the last tile of a chunk has the most to do, so it starts first
    m, b = tl.num_programs(1) - 1 - tl.program_id(1), tl.program_id(2).to(tl.int64)
    p, at = part * BP + tl.arange(0, BP), tl.arange(0, TILE)
    c = m * TILE // CHUNK
    begin = (c * CHUNK).to(tl.int64)
    row = m * TILE - c * CHUNK  # of the tile in its chunk
    ok, p_ok = m * TILE + at < T, p < P
    cell = (b * H + h) * chunks + c
    x += b * x_b + begin * x_t + h // (H // XH) * x_h
    dt += b * dt_b + begin * dt_t + h * dt_h
    B += b * k_b + begin * k_t + h // (H // BG) * k_g
    C += b * q_b + begin * q_t + h // (H // CG) * q_g + (row + at)[:, None] * q_t
    sums += cell * CHUNK
    states += cell * (P * N)
    decay = tl.load(sums + row + at, mask=ok, other=0.0)  # [L]
    coarse, fine = split(decay)

    acc = tl.zeros([TILE, BP], tl.float32)
    for k in tl.static_range(0, N, SN):
        i = k + tl.arange(0, SN)
        i_ok = i < N
        part_c = tl.load(C + i[None, :], mask=ok[:, None] & i_ok[None, :], other=0.0)  # [L, N]
        state = tl.load(
            states + p[None, :] * N + i[:, None], mask=i_ok[:, None] & p_ok[None, :], other=0.0
        )  # [N, P]
        acc = dot(part_c, state, acc)
    acc *= tl.exp(tl.minimum(coarse, 0.0))[:, None]

    for s in range(0, row + TILE, TILE):
        inside = begin + s + at < T
        scores = tl.zeros([TILE, TILE], tl.float32)
        for k in tl.static_range(0, N, BN):
            n = k + tl.arange(0, BN)
            n_ok = n < N
            query = tl.load(C + n[None, :], mask=ok[:, None] & n_ok[None, :], other=0.0)
            key = tl.load(
                B + (s + at)[None, :] * k_t + n[:, None],
                mask=n_ok[:, None] & inside[None, :],
                other=0.0,
            )  # [N, S]
            scores = dot(query, key, scores)
        earlier = tl.load(sums + s + at, mask=inside, other=0.0)  # [S]
        coarse_s, fine_s = split(earlier)
        gap = (coarse[:, None] - coarse_s[None, :]) + (fine[:, None] - fine_s[None, :])
        step = tl.load(dt + (s + at) * dt_t, mask=inside, other=0.0)
        weight = tl.exp(tl.minimum(gap, 0.0)) * step[None, :]  # [L, S]
        past = (row + at)[:, None] >= (s + at)[None, :]
        value = tl.load(
            x + (s + at)[:, None] * x_t + p[None, :],
            mask=inside[:, None] & p_ok[None, :],
            other=0.0,
        )  # [S, P]
        acc = dot(tl.where(past, scores * weight, 0.0).to(value.dtype), value, acc)
    element = ((b * T + begin + row + at)[:, None] * H + h) * P + p[None, :]
    acc = rounded(acc, y.dtype.element_ty)
    tl.store(y + element, acc, mask=ok[:, None] & p_ok[None, :])


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    initial_state: Tensor | None = None,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """`kernels.reference.ssd` without documents, for x, B and C in one of bf16 and fp32.

    x [B, T, Hx, P] with Hx dividing H repeats its heads consecutively; dt [B, T, H] and A [H]
    fp32, B and C [B, T, G, N] with a G each that divides H, T > 0, any strides. Chunks are
    rounded up to whole tiles. Returns y [B, T, H, P] and the final state [B, H, P, N], fp32.
    """
    return scan(x, dt, A, B, C, initial_state, None, chunk_size, y_dtype=torch.float32)[:2]


def scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    initial_state: Tensor | None,
    documents: Tensor | None,
    chunk_size: int,
    y_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """`ssd` with documents [B, T], int32 and contiguous, and outputs in `y_dtype`.

    Also returns the state that enters every chunk [B, H, chunks, P, N] in the dtype of x.
    """
    (batch, length, heads), (x_heads, width) = dt.shape, x.shape[2:]
    size, blocks = B.shape[3], BLOCKS[x.dtype]
    x, B, C = (t if t.stride(3) == 1 else t.contiguous() for t in (x, B, C))
    chunk = max(triton.next_power_of_2(chunk_size), blocks.tile)
    chunks = triton.cdiv(length, chunk)
    sums = x.new_empty(batch, heads, chunks, chunk, dtype=torch.float64)
    y = x.new_empty(batch, length, heads, width, dtype=y_dtype)

    sizes = {"H": heads, "P": width, "N": size, "XH": x_heads, "BG": B.shape[2]}
    sizes |= {"CHUNK": chunk, "TILE": blocks.tile}
    fresh, kept = add_up(x, dt, A, B, documents, sums, sizes, backward=False)
    entering, final = pass_on(fresh, kept, initial_state, x.dtype, backward=False)
    bp = block(width, blocks.output_p)
    tiles = triton.cdiv(length, blocks.tile)
    _output_kernel[(heads * triton.cdiv(width, bp), tiles, batch)](
        x, dt, B, C, sums, entering, y, length, chunks, *x.stride()[:3], *dt.stride(),
        *B.stride()[:3], *C.stride()[:3], **sizes, CG=C.shape[2], BP=bp,
        BN=block(size, blocks.output_n), SN=block(size, blocks.state_n),
        **launch_options(False, num_warps=4, num_stages=2),
    )  # fmt: skip
    return y, final, entering


def add_up(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    documents: Tensor | None,
    sums: Tensor,
    sizes: dict[str, int],
    backward: bool,
) -> tuple[Tensor, Tensor]:
    """Additions [B, H, chunks, P, N] and kept fractions [B, H, chunks] in fp32; fills `sums`.

    That is [B, H, chunks, chunk] in fp64, or [B, H, chunks, 4, chunk] in fp32 if `backward`.
    """
    (batch, length, heads), width, size = dt.shape, x.shape[3], B.shape[3]
    chunks = triton.cdiv(length, sizes["CHUNK"])
    kept = x.new_empty(batch, heads, chunks, dtype=torch.float32)
    fresh = x.new_empty(batch, heads, chunks, width, size, dtype=torch.float32)
    bp, bn = (block(n, most) for n, most in zip((width, size), BLOCKS[x.dtype][1:3], strict=True))
    chunk_kernel[(heads * triton.cdiv(width, bp) * triton.cdiv(size, bn), chunks, batch)](
        x, dt, A, B, dt if documents is None else documents, sums, kept, fresh, length, chunks,
        *x.stride()[:3], *dt.stride(), *B.stride()[:3], **sizes, BP=bp, BN=bn,
        DOCUMENTS=documents is not None, BACKWARD=backward,
        **launch_options(False, num_warps=4, num_stages=2),
    )  # fmt: skip
    return fresh, kept


def pass_on(
    fresh: Tensor, kept: Tensor, initial: Tensor | None, dtype: torch.dtype, backward: bool
) -> tuple[Tensor, Tensor]:
    """States before every chunk [B, H, chunks, P, N] in `dtype`, and the last [B, H, P, N]."""
    batch, heads, chunks, width, size = fresh.shape
    entering = torch.empty_like(fresh, dtype=dtype)
    final = fresh.new_empty(batch, heads, width, size)
    start = final if initial is None else initial.float().contiguous()
    pass_kernel[(triton.cdiv(width * size, PASS_BLOCK), batch * heads)](
        fresh, kept, start, entering, final, chunks, SIZE=width * size, BLOCK=PASS_BLOCK,
        INITIAL=initial is not None, BACKWARD=backward, **launch_options(False, num_warps=4),
    )  # fmt: skip
    return entering, final


def block(width: int, most: int) -> int:
    """Columns of a tile: what a matrix product of Triton can take."""
    return min(max(triton.next_power_of_2(width), 16), most)
