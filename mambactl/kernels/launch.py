"""Options of kernel launches: programmatic dependent launch, and Triton's interpreter.

With programmatic dependent launch a kernel starts while its predecessor still runs. Before
`gdc_wait` it may read weights, constants and the fields LENGTH, ACTIVE, BASE and NEXT of a batch's
progress, which only the last kernel of a step writes; what any earlier kernel wrote is visible
after it. Every program must wait before it returns, or the kernel after the next could run too
early.
"""

from typing import Any

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

__all__ = [
    "INTERPRETED",
    "dot",
    "four_e4m3",
    "gdc_launch_dependents",
    "gdc_wait",
    "launch_options",
    "rounded",
]

INTERPRETED = bool(triton.knobs.runtime.interpret)
_WIDEN = tl.constexpr(INTERPRETED)


def launch_options(pdl: bool, **options: Any) -> dict[str, Any]:
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


_UNPACK = tl.constexpr("""{
    .reg .b16 low, high, a, b, c, d;
    .reg .b32 first, last;
    mov.b32 {low, high}, $4;
    cvt.rn.f16x2.e4m3x2 first, low;
    cvt.rn.f16x2.e4m3x2 last, high;
    mov.b32 {a, b}, first;
    mov.b32 {c, d}, last;
    cvt.f32.f16 $0, a;
    cvt.f32.f16 $1, b;
    cvt.f32.f16 $2, c;
    cvt.f32.f16 $3, d;
}""")


@triton.jit
def _byte(words, number: tl.constexpr):
    byte = ((words >> (8 * number)) & 255).to(tl.uint8)
    return byte.to(tl.float8e4nv, bitcast=True).to(tl.float32)


@triton.jit
def four_e4m3(words):
    """The four e4m3 numbers in each int32, lowest byte first, as fp32."""
    if _WIDEN:
        a, b, c, d = _byte(words, 0), _byte(words, 1), _byte(words, 2), _byte(words, 3)
    else:
        # the compiler would take words apart into bytes and put pairs of them together again
        a, b, c, d = tl.inline_asm_elementwise(
            _UNPACK,
            "=f,=f,=f,=f,r",
            [words],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
            is_pure=True,
            pack=1,
        )
    return a, b, c, d


@triton.jit
def rounded(x, kind: tl.constexpr):
    """fp32 `x` in `kind`, to nearest even."""
    if _WIDEN and kind == tl.bfloat16:
        # the interpreter truncates
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        x = bits.to(tl.float32, bitcast=True)
    return x.to(kind)
