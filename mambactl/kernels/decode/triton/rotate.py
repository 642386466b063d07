"""Rotation of states in a decode pass: B and C, in the ring that they were convolved into."""

import triton
import triton.language as tl
from torch import Tensor

from mambactl.kernels.launch import gdc_launch_dependents, gdc_wait, launch_options, rounded


@triton.jit(do_not_specialize=["T", "offset", "scale"])
def _rotate_kernel(
    mixed, cos, sin, start, count, width, T, offset, scale, GROUPS: tl.constexpr,
    HALF: tl.constexpr, SLOTS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Pairs (j, j + HALF) of every group of one row."""
    m = tl.program_id(0)
    if PDL:
        gdc_launch_dependents()
    b, t = m // T, m % T
    # where sequences stand does not change within a step
    at = tl.load(start + b) + offset + t
    real = (t < tl.load(count + b) * scale) & (at >= 0)
    pair = tl.arange(0, BLOCK)
    ok = (pair < GROUPS * HALF) & real
    group, j = pair // HALF, pair % HALF
    c = tl.load(cos + at * HALF + j, mask=ok, other=1.0)
    s = tl.load(sin + at * HALF + j, mask=ok, other=0.0)
    slot = (b * SLOTS + (at + SLOTS) % SLOTS).to(tl.int64)
    pointer = mixed + (slot + 1) * width - GROUPS * 2 * HALF + group * 2 * HALF + j
    if PDL:
        gdc_wait()
    # L1 may hold what an earlier step left there
    low = tl.load(pointer, mask=ok, other=0.0, cache_modifier=".cg").to(tl.float32)
    high = tl.load(pointer + HALF, mask=ok, other=0.0, cache_modifier=".cg").to(tl.float32)
    kind = mixed.dtype.element_ty
    tl.store(pointer, rounded(low * c - high * s, kind), mask=ok)
    tl.store(pointer + HALF, rounded(high * c + low * s, kind), mask=ok)


def rotate(
    mixed: Tensor, cos: Tensor, sin: Tensor, start: Tensor, count: Tensor, scale: int, *, T: int,
    offset: int, groups: int, pdl: bool,
) -> None:  # fmt: skip
    """Rotate B and C by their positions; see `kernels.decode.reference.recurrent.rotate`."""
    batch, slots, width = mixed.shape
    half = cos.shape[1]
    _rotate_kernel[(batch * T,)](
        mixed, cos, sin, start, count, width, T, offset, scale, GROUPS=groups, HALF=half,
        SLOTS=slots, BLOCK=triton.next_power_of_2(groups * half), PDL=pdl,
        **launch_options(pdl, num_warps=4),
    )  # fmt: skip
