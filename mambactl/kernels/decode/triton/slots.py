"""Slot of a position in a cache of keys and values: `kernels.decode.reference.slots` in Triton."""

import triton
import triton.language as tl


@triton.jit
def slot_of(position, SINKS: tl.constexpr, RING: tl.constexpr):
    """The slot of each position."""
    if RING == 0:
        return position
    else:
        return tl.where(position < SINKS, position, SINKS + position % RING)
