"""Norms, rotation and scale of queries and keys that a projection has left as they are.

For families that a fused projection does not cover: a norm takes whole heads, or all of them.
"""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from mambactl.kernels.decode.operations import AttentionArguments
from mambactl.kernels.decode.triton.decode_attention import slot_of
from mambactl.kernels.launch import gdc_launch_dependents, gdc_wait, launch_options, rounded

# which heads a norm is of
NONE, EACH, ALL = 0, 1, 2


@triton.jit
def _pairs(base, step, ok, HEADS: tl.constexpr, N: tl.constexpr, P: tl.constexpr,
           HALF: tl.constexpr):  # fmt: skip
    """Pointers to the first halves [HEADS, HALF] of N heads, which are there, and both halves."""
    head, j = tl.arange(0, HEADS), tl.arange(0, HALF)
    there = (head < N)[:, None] & (j < P // 2)[None, :] & ok
    pointers = base + head[:, None] * step + j[None, :]
    # L1 may hold what an earlier step left there
    low = tl.load(pointers, mask=there, other=0.0, cache_modifier=".cg").to(tl.float32)
    high = tl.load(pointers + P // 2, mask=there, other=0.0, cache_modifier=".cg").to(tl.float32)
    return pointers, there, low, high


@triton.jit
def _put(
    pointers, there, low, high, gain, rate, c, s, factor,
    HEADS: tl.constexpr, P: tl.constexpr, HALF: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Norm by `rate` [HEADS, 1], rotate and store; rounded where the model's own norm rounds."""
    kind = pointers.dtype.element_ty
    if NORM > 0:
        head, j = tl.arange(0, HEADS), tl.arange(0, HALF)
        at = gain + (head * P if NORM == 2 else head * 0)[:, None] + j[None, :]
        one = tl.load(at, mask=there, other=0.0).to(tl.float32)
        other = tl.load(at + P // 2, mask=there, other=0.0).to(tl.float32)
        low = rounded(rounded(low * rate, kind).to(tl.float32) * one, kind).to(tl.float32)
        high = rounded(rounded(high * rate, kind).to(tl.float32) * other, kind).to(tl.float32)
    low, high = low * c - high * s, high * c + low * s
    tl.store(pointers, rounded(low * factor, kind), mask=there)
    tl.store(pointers + P // 2, rounded(high * factor, kind), mask=there)


@triton.jit
def _settle(
    base0, step0, gain0, base1, step1, gain1, ok, eps, c, s, factor,
    N0: tl.constexpr, N1: tl.constexpr, P: tl.constexpr, HALF: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """The heads of one row, of up to two attentions (N1 = 0: one)."""
    HEADS0: tl.constexpr = triton.next_power_of_2(N0)
    HEADS1: tl.constexpr = triton.next_power_of_2(N1 if N1 > 0 else 1)
    at0, there0, low0, high0 = _pairs(base0, step0, ok, HEADS0, N0, P, HALF)
    sum0 = tl.sum(low0 * low0 + high0 * high0, 1)[:, None]  # [HEADS, 1]
    if N1 > 0:
        at1, there1, low1, high1 = _pairs(base1, step1, ok, HEADS1, N1, P, HALF)
        sum1 = tl.sum(low1 * low1 + high1 * high1, 1)[:, None]
    size = P
    if NORM == 2:
        size = (N0 + N1) * P
        total = tl.sum(sum0)
        if N1 > 0:
            total += tl.sum(sum1)
            sum1 = sum1 * 0.0 + total
        sum0 = sum0 * 0.0 + total
    rate0 = tl.rsqrt(sum0 / size + eps)
    _put(at0, there0, low0, high0, gain0, rate0, c, s, factor, HEADS0, P, HALF, NORM)
    if N1 > 0:
        rate1 = tl.rsqrt(sum1 / size + eps)
        _put(at1, there1, low1, high1, gain1, rate1, c, s, factor, HEADS1, P, HALF, NORM)


@triton.jit(do_not_specialize=["T", "offset", "scale"])
def _settle_kernel(
    q0, keys0, slots0, q_gain0, k_gain0, q1, keys1, slots1, q_gain1, k_gain1, cos, sin, start,
    count, eps, factor, T, offset, scale,
    H0: tl.constexpr, HK0: tl.constexpr, SINKS0: tl.constexpr, RING0: tl.constexpr,
    H1: tl.constexpr, HK1: tl.constexpr, SINKS1: tl.constexpr, RING1: tl.constexpr,
    P: tl.constexpr, HALF: tl.constexpr, NORM: tl.constexpr, ROTATES: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0)
    if PDL:
        gdc_launch_dependents()
    b, t = m // T, m % T
    # where sequences stand does not change within a step
    at = tl.load(start + b) + offset + t
    ok = (t < tl.load(count + b) * scale) & (at >= 0)
    j = tl.arange(0, HALF)
    c, s = (j * 0 + 1.0)[None, :], (j * 0.0)[None, :]
    if ROTATES:
        angle = at * (P // 2) + j
        inside = ok & (j < P // 2)
        c = tl.load(cos + angle, mask=inside, other=1.0)[None, :]
        s = tl.load(sin + angle, mask=inside, other=0.0)[None, :]
    if PDL:
        gdc_wait()
    if tl.program_id(1) == 0:
        base0 = q0 + m.to(tl.int64) * H0 * P
        base1 = q1 + m.to(tl.int64) * H1 * P
        _settle(base0, P, q_gain0, base1, P, q_gain1, ok, eps, c, s, factor, H0, H1, P, HALF, NORM)
    else:
        base0 = keys0 + ((b * HK0).to(tl.int64) * slots0 + slot_of(at, SINKS0, RING0)) * P
        base1 = keys1 + ((b * HK1).to(tl.int64) * slots1 + slot_of(at, SINKS1, RING1)) * P
        _settle(
            base0, slots0 * P, k_gain0, base1, slots1 * P, k_gain1, ok, eps, c, s, 1.0, HK0, HK1,
            P, HALF, NORM,
        )  # fmt: skip


def settle_heads(
    parts: Sequence[AttentionArguments], gains: Sequence[tuple[Tensor, Tensor]], eps: float,
    factor: float, rotation: tuple[Tensor, Tensor] | None, start: Tensor, count: Tensor,
    scale: int, *, T: int, offset: int, joint: bool = False, pdl: bool,
) -> None:  # fmt: skip
    """See `kernels.decode.reference.heads.settle_heads`; one or two `parts`."""
    first = parts[0]
    width = first.keys.shape[3]
    norm = NONE
    if gains:
        norm = ALL if joint else EACH
    pointers, sizes = [], {}
    for number in range(2):
        there = number < len(parts)
        part = parts[number] if there else first
        pair = gains[number] if there and gains else (part.q, part.q)
        pointers += [part.q, part.keys, part.keys.shape[2], *pair]
        own = part.shape if there else (0, 0, 0, 0)
        names = ("H", "HK", "SINKS", "RING")
        sizes |= {f"{name}{number}": size for name, size in zip(names, own, strict=True)}
    _settle_kernel[(len(first.q), 2)](
        *pointers, *(rotation or (first.q, first.q)), start, count, eps, factor, T, offset, scale,
        **sizes, P=width, HALF=triton.next_power_of_2(width // 2), NORM=norm,
        ROTATES=rotation is not None, PDL=pdl, **launch_options(pdl, num_warps=4),
    )  # fmt: skip
