"""Flash decoding: attention of a few new tokens per sequence, with the cache cut over programs.

The slots of a sequence form blocks of BLOCK_K at absolute offsets, and block j belongs to split
j % SPLITS, which takes its blocks in ascending order. What a row sees of a block thus depends on
its own position alone, and a block it sees nothing of leaves its running maximum, sum and values
as they are. Tiles of rows are as high as H / Hk asks for, whatever T is, because the order of a
sum within a block could depend on the height. So for the same `splits` and `block_k` a row comes
out bit for bit the same in every segment. The last split to finish adds all up, in order.

With sinks the blocks that hold them come first, then those of the window; few blocks are left then,
and one split takes them all.
"""

import math

import triton
import triton.language as tl
from torch import Tensor

from mambactl.kernels.decode.reference.decode_attention import counter_shape, partial_shape
from mambactl.kernels.launch import dot, gdc_launch_dependents, gdc_wait, launch_options, rounded


@triton.jit
def slot_of(position, SINKS: tl.constexpr, RING: tl.constexpr):
    """The slot of each position."""
    if RING == 0:
        return position
    else:
        return tl.where(position < SINKS, position, SINKS + position % RING)


__all__ = ["counter_shape", "decode_attention", "partial_shape"]


@triton.jit
def _product(a, b):
    """a @ b in fp32."""
    return dot(a, b, tl.zeros([a.shape[0], b.shape[1]], tl.float32))


@triton.jit
def _attend(
    query, keys, values, position, first, stop, begin, end,
    P: tl.constexpr, LOG2_SCALE: tl.constexpr, WINDOW: tl.constexpr, SINKS: tl.constexpr,
    RING: tl.constexpr, SPLITS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Blocks first, first + SPLITS, ... < stop: maximum (log2) and sum [R], values [R, P].

    With sinks (and SPLITS = 1) the blocks that hold them come before all, if they are not among
    these.
    """
    highest = tl.full([BLOCK_R], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    acc = tl.zeros([BLOCK_R, BLOCK_P], tl.float32)
    column = tl.arange(0, BLOCK_P)
    start = first
    if SINKS > 0:
        start -= tl.minimum(first, (SINKS + BLOCK_K - 1) // BLOCK_K)
    for j in range(start, stop, SPLITS):
        at = tl.where(j < first, j - start, j) * BLOCK_K + tl.arange(0, BLOCK_K)
        elements = slot_of(at, SINKS, RING)[:, None] * P + column[None, :]  # [K, P]
        used = at < end
        seen = at[None, :] <= position[:, None]  # [R, K]
        if WINDOW > 0:
            # a slot of a ring that nobody sees may hold anything
            used = used & ((at > begin - WINDOW) | (at < SINKS))
            seen = seen & ((at[None, :] > position[:, None] - WINDOW) | (at < SINKS)[None, :])
        there = used[:, None] & (column < P)[None, :]
        key = tl.load(keys + elements, mask=there, other=0.0)
        value = tl.load(values + elements, mask=there, other=0.0)
        score = tl.where(seen, _product(query, tl.trans(key)) * LOG2_SCALE, float("-inf"))
        top = tl.maximum(highest, tl.max(score, 1))
        # a row that has seen nothing yet must not compute -inf - -inf
        level = tl.where(top == float("-inf"), 0.0, top)
        weight = tl.exp2(score - level[:, None])
        kept = tl.exp2(highest - level)
        total = total * kept + tl.sum(weight, 1)
        acc = acc * kept[:, None] + _product(rounded(weight, value.dtype), value)
        highest = top
    return highest, total, acc


@triton.jit
def _write(out, row, token, live, y, G: tl.constexpr, ROW: tl.constexpr, P: tl.constexpr):
    """Rows (t, g) of y [R, P] to `out`, which points at this KV head in the first token's row."""
    column = tl.arange(0, y.shape[1])
    elements = token[:, None] * ROW + (row % G)[:, None] * P + column[None, :]
    mask = live[:, None] & (column < P)[None, :]
    tl.store(out + elements, rounded(y, out.dtype.element_ty), mask=mask)


@triton.jit
def _save(partial, floats, at, live, highest, total, acc, P: tl.constexpr):
    """One split's result to rows `at` [R] of `partial`: values [floats, P], maxima, sums."""
    column = tl.arange(0, acc.shape[1])
    mask = live[:, None] & (column < P)[None, :]
    tl.store(partial + floats * P + at, highest, mask=live)
    tl.store(partial + floats * (P + 1) + at, total, mask=live)
    tl.store(partial + at[:, None] * P + column[None, :], acc, mask=mask)


@triton.jit
def _combine(
    partial, floats, at, stride, live, lo, blocks,
    P: tl.constexpr, SPLITS: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """y [R, P] from the results of splits 0, 1, ..., those without a block left out.

    Rows `at` [R] of `partial` are split 0's. Loads pass by L1, which may hold what an earlier
    launch left there.
    """
    UNROLL: tl.constexpr = 16 if at.shape[0] * BLOCK_P <= 4096 else 4  # what registers hold
    maxima, sums = partial + floats * P, partial + floats * (P + 1)
    column = tl.arange(0, BLOCK_P)
    highest = tl.full(at.shape, float("-inf"), tl.float32)
    for s in tl.range(0, SPLITS, loop_unroll_factor=UNROLL):
        there = live & (_blocks_ahead(s, lo, SPLITS) < blocks)
        top = tl.load(
            maxima + s * stride + at, mask=there, other=float("-inf"), cache_modifier=".cg"
        )
        highest = tl.maximum(highest, top)
    level = tl.where(live, highest, 0.0)
    total = tl.zeros(at.shape, tl.float32)
    acc = tl.zeros([at.shape[0], BLOCK_P], tl.float32)
    for s in tl.range(0, SPLITS, loop_unroll_factor=UNROLL):
        there = live & (_blocks_ahead(s, lo, SPLITS) < blocks)
        from_s = s * stride + at
        top = tl.load(maxima + from_s, mask=there, other=float("-inf"), cache_modifier=".cg")
        part = tl.load(sums + from_s, mask=there, other=0.0, cache_modifier=".cg")
        y = tl.load(
            partial + from_s[:, None] * P + column[None, :],
            mask=there[:, None] & (column < P)[None, :],
            other=0.0,
            cache_modifier=".cg",
        )
        weight = tl.exp2(top - level)
        total += weight * part
        acc += weight[:, None] * y
    return acc / tl.where(live, total, 1.0)[:, None]


@triton.jit
def _blocks_ahead(split, lo, SPLITS: tl.constexpr):
    """Blocks between block `lo` and the first one of `split` from there on."""
    return (split + SPLITS - lo % SPLITS) % SPLITS


@triton.jit
def attend_program(
    split, tile, head, b, batch, tickets, q, keys, values, start, count, out, partial, counter,
    scale, T, offset, S,
    HK: tl.constexpr, G: tl.constexpr, P: tl.constexpr, LOG2_SCALE: tl.constexpr,
    WINDOW: tl.constexpr, SINKS: tl.constexpr, RING: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr, COMBINE_R: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One split of one KV head's rows in one of `batch` sequences, which have `tickets` each."""
    # where sequences stand does not change within a step
    begin = tl.load(start + b) + offset
    n_new = tl.load(count + b) * scale
    if PDL:
        gdc_wait()
    end = tl.maximum(begin + n_new, 0)
    lo = 0
    if WINDOW > 0:
        lo = tl.maximum(begin - WINDOW + 1, 0) // BLOCK_K
    blocks = tl.where(n_new > 0, tl.cdiv(end, BLOCK_K) - lo, 0)
    ahead = _blocks_ahead(split, lo, SPLITS)
    if ahead < blocks:
        row = tile * BLOCK_R + tl.arange(0, BLOCK_R)
        token = row // G  # [R]
        live = (token < n_new) & (begin + token >= 0)
        column = tl.arange(0, BLOCK_P)
        ROW: tl.constexpr = HK * G * P
        corner = b.to(tl.int64) * T * ROW + head * G * P
        query = tl.load(
            q + corner + token[:, None] * ROW + (row % G)[:, None] * P + column[None, :],
            mask=live[:, None] & (column < P)[None, :],
            other=0.0,
        )  # [R, P]
        cache = (b * HK + head).to(tl.int64) * S * P
        highest, total, acc = _attend(
            query, keys + cache, values + cache, begin + token, lo + ahead, lo + blocks,
            begin, end, P, LOG2_SCALE, WINDOW, SINKS, RING, SPLITS, BLOCK_R, BLOCK_K, BLOCK_P,
        )  # fmt: skip
        if SPLITS == 1:
            y = acc / tl.where(live, total, 1.0)[:, None]
            _write(out + corner, row, token, live, y, G, ROW, P)
        else:
            stride = T * G
            lane = (b * HK + head) * SPLITS * stride
            floats = batch * HK * SPLITS * stride
            _save(partial, floats, lane + split * stride + row, live, highest, total, acc, P)
            ticket = counter + b * tickets + tile * HK + head
            tl.debug_barrier()
            arrived = tl.atomic_add(ticket, 1, sem="acq_rel", scope="gpu")
            if arrived == tl.minimum(blocks, SPLITS) - 1:
                tl.store(ticket, 0)
                # as few rows as T has: nothing here is summed across threads
                few = tile * BLOCK_R + tl.arange(0, COMBINE_R)
                few_live = (few // G < n_new) & (begin + few // G >= 0)
                sums = _combine(
                    partial, floats, lane + few, stride, few_live, lo, blocks, P, SPLITS, BLOCK_P
                )
                _write(out + corner, few, few // G, few_live, sums, G, ROW, P)


@triton.jit(do_not_specialize=["scale", "T", "offset"])
def _decode_attention(
    q, keys, values, start, count, out, partial, counter, scale, T, offset, S,
    HK: tl.constexpr, G: tl.constexpr, P: tl.constexpr, LOG2_SCALE: tl.constexpr,
    WINDOW: tl.constexpr, SINKS: tl.constexpr, RING: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr, COMBINE_R: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
    attend_program(
        tl.program_id(0), tl.program_id(1) // HK, tl.program_id(1) % HK, tl.program_id(2),
        tl.num_programs(2), tl.num_programs(1), q, keys, values, start, count, out, partial,
        counter, scale, T, offset, S, HK, G, P, LOG2_SCALE, WINDOW, SINKS, RING, SPLITS,
        BLOCK_R, BLOCK_K, BLOCK_P, COMBINE_R, PDL,
    )  # fmt: skip


def attention_sizes(
    keys: Tensor, row: int, T: int, splits: int, window: int, sinks: int, ring: int, block_k: int
) -> tuple[int, dict[str, int | float]]:
    """Tiles of rows for each KV head, and sizes of `attend_program`; queries have `row` columns.

    Raises ValueError for sinks without a window or with several splits.
    """
    if sinks and (splits > 1 or not window):
        raise ValueError("sinks take one split and a window")
    _, kv_heads, _, width = keys.shape
    group = row // (kv_heads * width)
    block_r = triton.next_power_of_2(max(16, 8 * group))  # 8 tokens in a tile; never by T
    sizes = {
        "HK": kv_heads, "G": group, "P": width, "LOG2_SCALE": math.log2(math.e) / math.sqrt(width),
        "WINDOW": window, "SINKS": sinks, "RING": ring, "SPLITS": splits, "BLOCK_R": block_r,
        "BLOCK_K": block_k, "BLOCK_P": triton.next_power_of_2(width),
        "COMBINE_R": min(block_r, triton.next_power_of_2(T * group)),
    }  # fmt: skip
    return triton.cdiv(T * group, block_r), sizes


def decode_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    start: Tensor,
    count: Tensor,
    scale: int,
    out: Tensor,
    partial: Tensor | None,
    counter: Tensor | None,
    *,
    T: int,
    offset: int = 0,
    splits: int,
    window: int = 0,
    sinks: int = 0,
    ring: int = 0,
    block_k: int = 64,
    pdl: bool = False,
) -> None:
    """`kernels.decode.reference.decode_attention`, each KV head's cache cut over `splits` programs.

    partial fp32 and counter int32 (zero) as `partial_shape` and `counter_shape` say; with one
    split neither is used. `splits` and `block_k` change the rounding, T and the grouping do not.
    """
    B, Hk, S, _ = keys.shape
    tiles, sizes = attention_sizes(keys, q.shape[1], T, splits, window, sinks, ring, block_k)
    _decode_attention[(splits, Hk * tiles, B)](
        q, keys, values, start, count, out, partial, counter, scale, T, offset, S, PDL=pdl,
        **sizes,
        **launch_options(pdl, num_warps=4, num_stages=3 if keys.element_size() == 2 else 2),
    )  # fmt: skip
