"""Options of kernel launches: programmatic dependent launch, and Triton's interpreter.

With programmatic dependent launch a kernel starts while its predecessor still runs. Before
`gdc_wait` it may read weights, constants and the fields LENGTH, ACTIVE, BASE and NEXT of a batch's
progress, which only the last kernel of a step writes; what any earlier kernel wrote is visible
after it. Every program must wait before it returns, or the kernel after the next could run too
early.
"""

import triton
import triton.language as tl
from triton import knobs
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

__all__ = [
    "INTERPRETED",
    "dot",
    "gdc_launch_dependents",
    "gdc_wait",
    "launch_options",
    "rounded",
]

INTERPRETED = bool(knobs.runtime.interpret)
_WIDEN = tl.constexpr(INTERPRETED)


def launch_options(pdl: bool, **options: object) -> dict[str, object]:
    """Keyword arguments of a launch; an interpreter has no use for `num_warps` and such."""
    if INTERPRETED:
        return {}
    return {**options, "launch_pdl": True} if pdl else options


@triton.jit
def dot(a, b, acc):
    """acc + a b in fp32; fp32 operands are not rounded to tf32."""
    if _WIDEN:
        # the interpreter multiplies the bit patterns of bf16
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def rounded(x, kind: tl.constexpr):
    """fp32 `x` in `kind`, to nearest even."""
    if _WIDEN and kind == tl.bfloat16:
        # the interpreter truncates
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        x = bits.to(tl.float32, bitcast=True)
    return x.to(kind)
