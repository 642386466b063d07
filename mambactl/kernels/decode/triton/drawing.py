"""Uniform numbers and the inverse cumulative distribution, for rows larger than one block.

A row to draw from is p = (logits, threshold, log_mass) as `filter_rows` leaves it. What is drawn
may instead be max(p - q, 0), with q alike plus a flag that switches it off, and may exclude one
banned token (-1: none).
"""

import triton
import triton.language as tl
from torch import Tensor

from mambactl.kernels import random
from mambactl.kernels.decode.triton.filtering import rows_per_setting
from mambactl.kernels.launch import gdc_launch_dependents, gdc_wait, launch_options

BLOCK = 4096
WARPS = 16
GOLDEN = tl.constexpr(random.GOLDEN % 2**64)
MIX_1 = tl.constexpr(random.MIX_1 % 2**64)
MIX_2 = tl.constexpr(random.MIX_2 % 2**64)
UNIFORM_BITS = tl.constexpr(random.UNIFORM_BITS)
UNIT = tl.constexpr(2.0**-random.UNIFORM_BITS)


@triton.jit
def _mix(value):
    value = (value ^ (value >> 30)) * MIX_1
    value = (value ^ (value >> 27)) * MIX_2
    return value ^ (value >> 31)


@triton.jit
def uniform(seed, key, position, stream):
    """The float64 numbers of `kernels.random.uniform`, bit for bit."""
    mixed = _mix(seed.to(tl.uint64) + GOLDEN)
    mixed = _mix(mixed + key.to(tl.uint64) + GOLDEN)
    mixed = _mix(mixed + position.to(tl.int64).to(tl.uint64) + GOLDEN)
    mixed = _mix(mixed + stream + GOLDEN)
    return (mixed >> (64 - UNIFORM_BITS)).to(tl.int64).to(tl.float64) * UNIT


@triton.jit
def probability(logit, temperature, threshold, log_mass):
    """Probability of logits in a filtered row; the division rounds as in `filter_rows`."""
    scaled = tl.div_rn(logit, temperature)
    return tl.where(scaled >= threshold, tl.exp(scaled - log_mass), 0.0)


@triton.jit
def _weights(tokens, V, temperature, p, q, banned, SUBTRACT: tl.constexpr):
    """Float64 weights of tokens [BLOCK], zero beyond the vocabulary."""
    logit = tl.load(p[0] + tokens, mask=tokens < V, other=float("-inf"))
    weight = probability(logit, temperature, p[1], p[2])
    if SUBTRACT:
        logit = tl.load(q[0] + tokens, mask=(tokens < V) & q[3], other=float("-inf"))
        weight = tl.maximum(weight - probability(logit, temperature, q[1], q[2]), 0.0)
    return tl.where(tokens == banned, 0.0, weight).to(tl.float64)


@triton.jit
def block_masses(
    V, temperature, p, q, banned,
    SUBTRACT: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """The weight of each block of the vocabulary, float64 [BLOCKS]."""
    masses = tl.zeros([BLOCKS], tl.float64)
    for index in range(0, tl.cdiv(V, BLOCK)):
        tokens = index * BLOCK + tl.arange(0, BLOCK)
        weights = _weights(tokens, V, temperature, p, q, banned, SUBTRACT)
        masses = tl.where(tl.arange(0, BLOCKS) == index, tl.sum(weights, 0), masses)
    return masses


@triton.jit
def _first_past(before, weights, goal, SIZE: tl.constexpr):
    """Index at which the running sum first exceeds the goal, never at a weight of zero.

    Rounding may leave the whole sum below the goal, which then means the last positive weight.
    """
    lane = tl.arange(0, SIZE)
    past = (before + tl.cumsum(weights, 0) > goal) & (weights > 0)
    first = tl.min(tl.where(past, lane, SIZE), 0)
    last = tl.max(tl.where(weights > 0, lane, 0), 0)
    return tl.where(first < SIZE, first, last)


@triton.jit
def choose(
    number, masses, V, temperature, p, q, banned,
    SUBTRACT: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """The token at the share `number` of all weight: first its block, then its index inside."""
    goal = number * tl.sum(masses, 0)
    block = _first_past(0.0, masses, goal, BLOCKS)
    before = tl.sum(tl.where(tl.arange(0, BLOCKS) < block, masses, 0.0), 0)
    tokens = block * BLOCK + tl.arange(0, BLOCK)
    weights = _weights(tokens, V, temperature, p, q, banned, SUBTRACT)
    return block * BLOCK + _first_past(before, weights, goal, BLOCK)


@triton.jit
def _draw_kernel(
    logits, settings, thresholds, log_masses, keys, positions, seed, stream, offset, tokens,
    token_stride, V, run, PDL: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    temperature = tl.load(settings + row // run * 3)
    p = (logits + row * V, tl.load(thresholds + row), tl.load(log_masses + row))
    masses = block_masses(V, temperature, p, p, -1, False, BLOCK, BLOCKS)
    position = tl.load(positions + row) + offset
    number = uniform(tl.load(seed), tl.load(keys + row), position, stream)
    token = choose(number, masses, V, temperature, p, p, -1, False, BLOCK, BLOCKS)
    tl.store(tokens + row * token_stride, token)


def block_sizes(vocabulary: int) -> dict[str, int]:
    """Compile-time sizes of a loop over the vocabulary: tokens per block, and how many blocks."""
    block = min(BLOCK, triton.next_power_of_2(vocabulary))
    return {"BLOCK": block, "BLOCKS": triton.next_power_of_2(triton.cdiv(vocabulary, block))}


def draw_rows(
    logits: Tensor,
    settings: Tensor,
    threshold: Tensor,
    log_mass: Tensor,
    keys: Tensor,
    positions: Tensor,
    seed: Tensor,
    stream: int,
    tokens: Tensor,
    *,
    offset: int = 0,
    pdl: bool = False,
) -> None:
    """Draw one token per row; see `kernels.decode.reference.verdict.draw_rows`."""
    rows, size = logits.shape
    _draw_kernel[(rows,)](
        logits,
        settings,
        threshold,
        log_mass,
        keys,
        positions,
        seed,
        int(stream),
        offset,
        tokens,
        tokens.stride(0),
        size,
        rows_per_setting(settings, rows),
        PDL=pdl,
        **block_sizes(size),
        **launch_options(pdl, num_warps=WARPS),
    )
