"""Where a cache of keys and values keeps a position: `kernels.window.slots` for kernels."""

import triton
import triton.language as tl


@triton.jit
def slot_of(position, SINKS: tl.constexpr, RING: tl.constexpr):
    """The slot of each position."""
    if RING == 0:
        return position
    else:
        return tl.where(position < SINKS, position, SINKS + position % RING)
