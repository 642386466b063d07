# pyright: basic, reportArgumentType=false, reportGeneralTypeIssues=false
"""A kernel that does nothing but read memory, which decoding is judged by."""

import triton
import triton.language as tl
from torch import Tensor

from mambactl.kernels.launch import launch_options

# fp32 numbers that a program loads at a time, and its warps: which reads fastest depends on the GPU
SHAPES = ((2048, 4), (4096, 4), (4096, 8), (8192, 8))


@triton.jit
def _read_kernel(source, sums, tiles, BLOCK: tl.constexpr, AHEAD: tl.constexpr):
    """Sum `tiles` groups of AHEAD blocks; all loads of a group are under way at once."""
    program = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for tile in range(tiles):
        first = source + (program * tiles + tile) * AHEAD * BLOCK + lanes
        for piece in tl.static_range(AHEAD):
            total += tl.load(first + piece * BLOCK, eviction_policy="evict_first")
    tl.store(sums + program, tl.sum(total))


def read(source: Tensor, sums: Tensor, block: int, warps: int, ahead: int = 4) -> int:
    """Sum equal stretches of source [N] fp32 into sums [programs]; returns the numbers read.

    The rest of N, less than a group of `ahead` blocks for every program, is left out.
    """
    programs = len(sums)
    tiles = len(source) // (programs * ahead * block)
    options = launch_options(False, num_warps=warps)
    _read_kernel[(programs,)](source, sums, tiles, BLOCK=block, AHEAD=ahead, **options)
    return programs * tiles * ahead * block
