"""Temperature, top-k and top-p of whole rows without sorting them.

One program per row. A threshold is found by multi-way search: every pass over the row measures
what lies above several candidates at once (how many logits, or how much mass) and narrows the
bracket to the part between two of them and to logits that occur. Candidates are spread over the
values first and, for logits that crowd together, over the ordered integer image of fp32 at last.
"""

import triton
import triton.language as tl
from torch import Tensor

from mambactl.kernels.launch import gdc_launch_dependents, gdc_wait, launch_options

BLOCK = 4096
LOG2_E = tl.constexpr(1.4426950408889634)
# candidates measured per pass
WAYS = tl.constexpr(8)
BY_VALUE = tl.constexpr(6)
# an eighth of 2^32 keys at a time needs 11 passes; the bound also ends rows of NaN
PASSES = tl.constexpr(18)


@triton.jit
def _flip(bits):
    """Between fp32 bit patterns and integers in the order of the values; its own inverse."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _key(value):
    return _flip(value.to(tl.int32, bitcast=True)).to(tl.int64)


@triton.jit
def _value(key):
    return _flip(key.to(tl.int32)).to(tl.float32, bitcast=True)


@triton.jit
def _range(row, V, BLOCK: tl.constexpr):
    """Largest and smallest logit of the row, -inf not counted."""
    lane = tl.arange(0, BLOCK)
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    bottom = tl.full([BLOCK], float("inf"), tl.float32)
    for start in range(0, V, BLOCK):
        x = tl.load(row + start + lane, mask=start + lane < V, other=float("-inf"))
        top = tl.maximum(top, x)
        bottom = tl.minimum(bottom, tl.where(x > float("-inf"), x, float("inf")))
    return tl.max(top, 0), tl.min(bottom, 0)


@triton.jit
def _above(row, V, levels, low, high, peak, rate, BY_MASS: tl.constexpr, BLOCK: tl.constexpr):
    """Mass or count at or above each level [WAYS], and the logits next to the bracket's ends."""
    lane = tl.arange(0, BLOCK)[:, None]
    total = tl.zeros([BLOCK, WAYS], tl.float32)
    least = tl.full([BLOCK, 1], float("inf"), tl.float32)
    most = tl.full([BLOCK, 1], float("-inf"), tl.float32)
    for start in range(0, V, BLOCK):
        x = tl.load(row + start + lane, mask=start + lane < V, other=float("-inf"))  # [BLOCK, 1]
        weight = tl.exp2((x - peak) * rate) if BY_MASS else 1.0
        total += tl.where(x >= levels[None, :], weight, 0.0)  # [BLOCK, WAYS]
        least = tl.minimum(least, tl.where(x >= low, x, float("inf")))
        most = tl.maximum(most, tl.where(x < high, x, float("-inf")))
    return tl.sum(total, 0), tl.min(tl.min(least, 1), 0), tl.max(tl.max(most, 1), 0)


@triton.jit
def _search(
    row, V, floor, low, goal, peak, rate, BY_MASS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The largest level from `low` on with at least `goal` above it (or equal), else `low`.

    The goal is a number of logits, or a share of the mass from `floor` on.
    """
    way = tl.arange(0, WAYS)
    high = _value(_key(peak) + 1)
    step = 0
    while (_key(low) + 1 < _key(high)) & (step < PASSES):
        by_value = low + (high - low) * (way.to(tl.float32) / WAYS)  # [WAYS]
        by_key = _value(_key(low) + (_key(high) - _key(low)) * way // WAYS)  # [WAYS]
        levels = tl.where(step < BY_VALUE, tl.clamp(by_value, low, high), by_key)
        levels = tl.where(way == 0, floor, levels)
        sums, least, most = _above(row, V, levels, low, high, peak, rate, BY_MASS, BLOCK)
        if BY_MASS:
            goal = tl.where(step == 0, goal * tl.max(sums, 0), goal)
        reached = sums >= goal  # [WAYS]
        low = tl.maximum(low, tl.max(tl.where(reached, levels, float("-inf")), 0))
        high = tl.minimum(high, tl.min(tl.where(reached, float("inf"), levels), 0))
        low = tl.maximum(low, least)
        high = tl.minimum(high, _value(_key(most) + 1))
        if not BY_MASS:
            exact = tl.min(tl.where(reached, sums, float("inf")), 0) == goal
            high = tl.where(exact, low, high)
        step += 1
    return low


@triton.jit
def _measure(row, V, low, peak, rate, BLOCK: tl.constexpr):
    """Mass from `low` on, the smallest logit there, and the largest one below."""
    lane = tl.arange(0, BLOCK)
    mass = tl.zeros([BLOCK], tl.float32)
    least = tl.full([BLOCK], float("inf"), tl.float32)
    below = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in range(0, V, BLOCK):
        x = tl.load(row + start + lane, mask=start + lane < V, other=float("-inf"))
        kept = (x >= low) & (x > float("-inf"))
        mass += tl.where(kept, tl.exp2((x - peak) * rate), 0.0)
        least = tl.minimum(least, tl.where(kept, x, float("inf")))
        below = tl.maximum(below, tl.where(x < low, x, float("-inf")))
    return tl.sum(mass, 0), tl.min(least, 0), tl.max(below, 0)


@triton.jit
def _filter_kernel(
    logits, settings, threshold, log_mass, V, run, PDL: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    program = tl.program_id(0)
    row = logits + program.to(tl.int64) * V
    own = settings + program // run * 3
    temperature = tl.load(own)
    top_k = tl.load(own + 1)
    top_p = tl.load(own + 2)
    rate = LOG2_E / temperature
    peak, bottom = _range(row, V, BLOCK)
    floor = bottom
    if (top_k > 0) & (top_k < V):
        floor = _search(row, V, bottom, bottom, top_k, peak, rate, False, BLOCK)
    low = floor
    if top_p < 1:
        # what is less likely than this holds under (1 - top_p) / e of the mass, all of it together
        reach = temperature * (tl.log(V / (1 - top_p)) + 1)
        start = tl.maximum(floor, peak - reach)
        low = _search(row, V, floor, start, top_p, peak, rate, True, BLOCK)
    mass, least, below = _measure(row, V, low, peak, rate, BLOCK)
    cut = tl.div_rn(least, temperature)
    # the division may round different logits to one value, and ties stay
    while tl.div_rn(below, temperature) == cut:
        mass, least, below = _measure(row, V, below, peak, rate, BLOCK)
    tl.store(threshold + program, cut)
    tl.store(log_mass + program, tl.div_rn(peak, temperature) + tl.log(mass))


def rows_per_setting(settings: Tensor, rows: int) -> int:
    """Number of consecutive rows, of `rows`, that share one of settings [3] or [S, 3]."""
    return rows * 3 // settings.numel()


def filter_rows(
    logits: Tensor, settings: Tensor, threshold: Tensor, log_mass: Tensor, *, pdl: bool = False
) -> None:
    """Find what top-k and top-p keep; see `kernels.decode.reference.verdict.filter_rows`."""
    rows, size = logits.shape
    _filter_kernel[(rows,)](
        logits,
        settings,
        threshold,
        log_mass,
        size,
        rows_per_setting(settings, rows),
        PDL=pdl,
        BLOCK=min(BLOCK, triton.next_power_of_2(size)),
        **launch_options(pdl, num_warps=16),
    )
