"""Filtering, drawing and judging tokens; one program per row or sequence."""

import triton
import triton.language as tl
from torch import Tensor

from mambactl.kernels import random
from mambactl.kernels.decode.reference.verdict import Field, Finish, Letter
from mambactl.kernels.decode.triton.drawing import (
    WARPS,
    block_masses,
    block_sizes,
    choose,
    draw_rows,
    probability,
    uniform,
)
from mambactl.kernels.decode.triton.filtering import filter_rows, rows_per_setting
from mambactl.kernels.launch import gdc_launch_dependents, gdc_wait, launch_options

__all__ = ["draw_rows", "filter_rows", "verdict_greedy", "verdict_sampled"]

ACCEPT = tl.constexpr(int(random.Stream.ACCEPT))
EMIT = tl.constexpr(int(random.Stream.EMIT))


@triton.jit
def _length(lengths, b, K, HAS_LENGTHS: tl.constexpr):
    length = K
    if HAS_LENGTHS:
        length = tl.minimum(tl.load(lengths + b), K)
    return length


@triton.jit
def _leading(passes, lane, length, LANES: tl.constexpr):
    """Count the true values before the first false one; passes [LANES] is false from length on."""
    return tl.minimum(tl.min(tl.where(passes, LANES, lane), 0), length)


@triton.jit
def _greedy_kernel(
    best, drafts, lengths, accepted, following, K, draft_stride,
    PDL: tl.constexpr, HAS_LENGTHS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    b = tl.program_id(0)
    length = _length(lengths, b, K, HAS_LENGTHS)
    lane = tl.arange(0, LANES)
    drafted = lane < length
    target = tl.load(best + b * (K + 1) + lane, mask=drafted, other=-1)
    token = tl.load(drafts + b * draft_stride + lane, mask=drafted, other=-1)
    count = _leading(drafted & (token == target), lane, length, LANES)
    tl.store(accepted + b, count)
    tl.store(following + b, tl.load(best + b * (K + 1) + count))


@triton.jit
def _at(logits, thresholds, log_masses, rows, V, token, temperature, mask):
    """The probability of one token [LANES] in each of several filtered rows [LANES]."""
    return probability(
        tl.load(logits + rows * V + token, mask=mask, other=0.0),
        temperature,
        tl.load(thresholds + rows, mask=mask, other=0.0),
        tl.load(log_masses + rows, mask=mask, other=0.0),
    )


@triton.jit
def _sampled_kernel(
    logits, settings, thresholds, log_masses, draft_logits, draft_thresholds, draft_log_masses,
    drafts, lengths, keys, positions, seed, accepted, following, B, K, draft_stride, V, run,
    PDL: tl.constexpr, HAS_LENGTHS: tl.constexpr, DRAFTED: tl.constexpr, LANES: tl.constexpr,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    b = tl.program_id(0).to(tl.int64)
    temperature, root = tl.load(settings + b // run * 3), tl.load(seed)
    key, position = tl.load(keys + b), tl.load(positions + b)
    length = _length(lengths, b, K, HAS_LENGTHS)
    lane = tl.arange(0, LANES)
    drafted = lane < length
    token = tl.load(drafts + b * draft_stride + lane, mask=drafted, other=0)
    rows = b * (K + 1) + lane
    target = _at(logits, thresholds, log_masses, rows, V, token, temperature, drafted)
    number = uniform(root, key, position + lane, ACCEPT)
    if DRAFTED:
        rows = lane.to(tl.int64) * B + b
        number *= _at(
            draft_logits, draft_thresholds, draft_log_masses, rows, V, token, temperature, drafted
        ).to(tl.float64)
    # strict, so that a token of target probability zero never passes, not even with number = 0
    passes = drafted & (number < target.to(tl.float64))
    count = _leading(passes, lane, length, LANES)
    rejected = count < length

    row = b * (K + 1) + count
    p = (logits + row * V, tl.load(thresholds + row), tl.load(log_masses + row))
    q = p
    banned = tl.full([], -1, tl.int32)
    if DRAFTED:
        row = count.to(tl.int64) * B + b
        q = (
            draft_logits + row * V,
            tl.load(draft_thresholds + row, mask=rejected, other=0.0),
            tl.load(draft_log_masses + row, mask=rejected, other=0.0),
            rejected,
        )
    else:
        banned = tl.max(tl.where(rejected & (lane == count), token, -1), 0)
    masses = block_masses(V, temperature, p, q, banned, DRAFTED, BLOCK, BLOCKS)
    usable = rejected & (tl.sum(masses, 0) > 0)
    if DRAFTED:
        q = (q[0], q[1], q[2], usable)
    banned = tl.where(usable, banned, -1)
    if rejected != usable:  # the residual underflowed
        masses = block_masses(V, temperature, p, q, banned, DRAFTED, BLOCK, BLOCKS)
    number = uniform(root, key, position + count, EMIT)
    token = choose(number, masses, V, temperature, p, q, banned, DRAFTED, BLOCK, BLOCKS)
    tl.store(accepted + b, count)
    tl.store(following + b, token)


def verdict_greedy(
    best: Tensor,
    drafts: Tensor,
    lengths: Tensor | None,
    accepted: Tensor,
    following: Tensor,
    *,
    pdl: bool = False,
) -> None:
    """Accept drafts greedily; see `kernels.decode.reference.verdict.verdict_greedy`."""
    batch = accepted.shape[0]
    width = best.numel() // batch - 1
    _greedy_kernel[(batch,)](
        best,
        drafts,
        lengths,
        accepted,
        following,
        width,
        drafts.stride(0),
        PDL=pdl,
        HAS_LENGTHS=lengths is not None,
        LANES=triton.next_power_of_2(max(width, 1)),
        **launch_options(pdl, num_warps=1),
    )


def verdict_sampled(
    logits: Tensor,
    settings: Tensor,
    threshold: Tensor,
    log_mass: Tensor,
    draft_logits: Tensor | None,
    draft_threshold: Tensor | None,
    draft_log_mass: Tensor | None,
    drafts: Tensor,
    lengths: Tensor | None,
    keys: Tensor,
    positions: Tensor,
    seed: Tensor,
    accepted: Tensor,
    following: Tensor,
    *,
    pdl: bool = False,
) -> None:
    """Accept drafts by sampling; see `kernels.decode.reference.verdict.verdict_sampled`."""
    batch, size = accepted.shape[0], logits.shape[1]
    width = logits.shape[0] // batch - 1
    _sampled_kernel[(batch,)](
        logits,
        settings,
        threshold,
        log_mass,
        draft_logits,
        draft_threshold,
        draft_log_mass,
        drafts,
        lengths,
        keys,
        positions,
        seed,
        accepted,
        following,
        batch,
        width,
        drafts.stride(0),
        size,
        rows_per_setting(settings, batch),
        PDL=pdl,
        HAS_LENGTHS=lengths is not None,
        DRAFTED=draft_logits is not None,
        LANES=triton.next_power_of_2(max(width, 1)),
        **block_sizes(size),
        **launch_options(pdl, num_warps=WARPS),
    )


LENGTH, ACTIVE, BASE, NEXT, DRAFT_BASE, DRAFT_NEXT, BUDGET, WRITTEN, STEP = (
    tl.constexpr(int(field)) for field in Field
)
ACCEPTED, DRAFTED, EMITTED, FINISH = (tl.constexpr(int(letter)) for letter in Letter)
LETTERS = tl.constexpr(len(Letter))
RUNNING, EOS, SPENT, IDLE = (tl.constexpr(int(finish)) for finish in Finish)


@triton.jit
def _next_store(begin, base, span, limit):
    lazy = tl.where((begin - base + 2 * span + 3 > limit) & (begin > base), begin, base)
    return tl.where(limit == 0, begin + 1, lazy)


@triton.jit
def _commit_kernel(
    progress, feed, history, accepted, following, drafted, eos, mailbox, n_eos, k, B, feed_stride,
    history_stride, depth, letter_size, span, limit, draft_limit, COUNTED: tl.constexpr,
    WIDE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    field = progress + b
    step = tl.load(field + STEP * B)
    letter = mailbox + (step % depth * B + b) * letter_size
    tl.store(field + STEP * B, step + 1)
    if tl.load(field + ACTIVE * B) == 0:
        tl.store(letter + EMITTED, 0)
        tl.store(letter + FINISH, IDLE)
        return
    n = tl.load(accepted + b)
    held = tl.load(field + LENGTH * B)
    budget = tl.load(field + BUDGET * B)
    last = tl.load(following + b)
    row = feed + b * feed_stride
    newest = tl.load(row + 1 + n)
    i = tl.arange(0, WIDE)
    new = tl.load(row + 2 + i, mask=i < n, other=0)
    new = tl.where(i == n, last, new)  # [WIDE], the first n + 1 count
    ended = i < 0
    for e in range(n_eos):
        ended = ended | (new == tl.load(eos + e))
    first_end = tl.min(tl.where(ended & (i <= n), i, WIDE))
    emitted = tl.minimum(budget, tl.minimum(first_end, n) + 1)
    finish = tl.where(emitted == budget, SPENT, RUNNING)
    finish = tl.where(emitted == first_end + 1, EOS, finish)
    tl.store(letter + ACCEPTED, n)
    if COUNTED:
        tl.store(letter + DRAFTED, tl.load(drafted + b))
    else:
        tl.store(letter + DRAFTED, k)
    tl.store(letter + EMITTED, emitted)
    tl.store(letter + FINISH, finish)
    tl.store(letter + LETTERS + i, new, mask=i <= n)
    index = held + 1 + i
    tl.store(history + b * history_stride + index, new, mask=(i <= n) & (index < history_stride))
    tl.store(row, newest)
    tl.store(row + 1, last)
    length = held + n + 1
    base, draft_base = tl.load(field + NEXT * B), tl.load(field + DRAFT_NEXT * B)
    tl.store(field + LENGTH * B, length)
    tl.store(field + BUDGET * B, budget - emitted)
    tl.store(field + WRITTEN * B, tl.load(field + WRITTEN * B) + emitted)
    tl.store(field + ACTIVE * B, tl.where(finish == RUNNING, 1, 0))
    tl.store(field + BASE * B, base)
    tl.store(field + DRAFT_BASE * B, draft_base)
    tl.store(field + NEXT * B, _next_store(length, base, span, limit))
    tl.store(field + DRAFT_NEXT * B, _next_store(length - 1, draft_base, span, draft_limit))


def commit(
    progress: Tensor, feed: Tensor, history: Tensor, accepted: Tensor, following: Tensor,
    drafted: Tensor | None, eos: Tensor, mailbox: Tensor, k: int, *, span: int, limit: int,
    draft_limit: int, pdl: bool,
) -> None:  # fmt: skip
    """Commit the accepted tokens; see `kernels.decode.reference.verdict.commit`."""
    depth, batch, letter_size = mailbox.shape
    # of a batch's first sequences alone the columns lie as far apart as those of all
    _commit_kernel[(batch,)](
        progress, feed, history, accepted, following, accepted if drafted is None else drafted,
        eos, mailbox, len(eos), k, progress.stride(0), feed.stride(0), history.stride(0), depth,
        letter_size, span, limit, draft_limit, COUNTED=drafted is not None,
        WIDE=triton.next_power_of_2(feed.shape[1]), PDL=pdl, **launch_options(pdl, num_warps=1),
    )  # fmt: skip
