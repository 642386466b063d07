"""Taps of a convolution over the columns of an input projection, read from a ring."""

import triton
import triton.language as tl


@triton.jit
def tap(weight, ch, ok, i: tl.constexpr):
    """Tap i of the convolution [BN] at channels `ch`."""
    return tl.load(weight + ch * 4 + i, mask=ok, other=0.0).to(tl.float32)


@triton.jit
def add_tap(x, w, total):
    """total + x w for rows x [BM, BN] and a tap [BN], rounded once."""
    return tl.fma(x, tl.broadcast_to(w[None, :], x.shape), total)


@triton.jit
def behind(ring, width, b, at, ch, ok, back: tl.constexpr, SLOTS: tl.constexpr):
    """Raw rows [BM, BN] `back` positions before `at`; zeros before position 0."""
    earlier = at - back
    rows = (b * SLOTS + (earlier + SLOTS) % SLOTS).to(tl.int64) * width
    return tl.load(
        ring + rows[:, None] + ch[None, :],
        mask=ok & (earlier >= 0)[:, None],
        other=0.0,
        cache_modifier=".cg",
    ).to(tl.float32)
