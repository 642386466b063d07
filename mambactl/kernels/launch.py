# pyright: basic, reportArgumentType=false
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
    "four_numbers",
    "gdc_launch_dependents",
    "gdc_wait",
    "launch_options",
    "rounded",
    "widened",
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


# four e4m3 numbers, or integers, of one register as fp32: each becomes half of a pair of fp16
_PAIRS = """
    mov.b32 {a, b}, first;
    mov.b32 {c, d}, last;
    cvt.f32.f16 $0, a;
    cvt.f32.f16 $1, b;
    cvt.f32.f16 $2, c;
    cvt.f32.f16 $3, d;
}"""
# the low byte of an fp16 number in [1024, 2048) is its distance from 1024
_BIASED = """
    xor.b32 biased, {word}, 0x80808080;
    prmt.b32 first, biased, 0x64646464, 0x4140;
    prmt.b32 last, biased, 0x64646464, 0x4342;
    mov.b32 bias, 0x64806480;
    sub.rn.f16x2 first, first, bias;
    sub.rn.f16x2 last, last, bias;
"""
_FOUR_E4M3 = tl.constexpr(
    """{
    .reg .b16 low, high, a, b, c, d;
    .reg .b32 first, last;
    mov.b32 {low, high}, $4;
    cvt.rn.f16x2.e4m3x2 first, low;
    cvt.rn.f16x2.e4m3x2 last, high;
"""
    + _PAIRS
)
_FOUR_INT8 = tl.constexpr(
    """{
    .reg .b16 a, b, c, d;
    .reg .b32 biased, bias, first, last;
"""
    + _BIASED.replace("{word}", "$4")
    + _PAIRS
)
_HALF_INT8 = tl.constexpr(
    """{
    .reg .b32 biased, bias, first, last;
"""
    + _BIASED.replace("{word}", "$2")
    + """
    mov.b32 $0, first;
    mov.b32 $1, last;
}"""
)


@triton.jit
def widened(tile, kind: tl.constexpr):
    """Bytes in fp16 or fp32, exactly: int8 are integers, uint8 are e4m3."""
    if tile.dtype == tl.uint8:
        wide = tile.to(tl.float8e4nv, bitcast=True).to(kind)
    elif kind == tl.float16 and not _WIDEN:
        # a conversion of integers takes four times as long as a multiplication
        wide = tl.inline_asm_elementwise(
            _HALF_INT8, "=r,=r,r", [tile], dtype=tl.float16, is_pure=True, pack=4
        )
    else:
        wide = tile.to(kind)
    return wide


@triton.jit
def _byte(words, number: tl.constexpr, kind: tl.constexpr):
    return widened(((words >> (8 * number)) & 255).to(kind), tl.float32)


@triton.jit
def four_numbers(words, kind: tl.constexpr):
    """The four bytes of each int32 as fp32, the lowest first; `kind` as in `widened`."""
    if _WIDEN:
        a, b = _byte(words, 0, kind), _byte(words, 1, kind)
        c, d = _byte(words, 2, kind), _byte(words, 3, kind)
    else:
        # the compiler would take words apart into bytes and put pairs of them together again
        a, b, c, d = tl.inline_asm_elementwise(
            _FOUR_E4M3 if kind == tl.uint8 else _FOUR_INT8,
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
