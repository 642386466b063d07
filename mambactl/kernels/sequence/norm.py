"""RMSNorm (arXiv 1910.07467), and the gated norm of Mamba-2 with its skip, in one kernel each.

Everything but the order of a sum is rounded as PyTorch rounds it. A row is rounded alike whatever
the rows beside it. Nothing here has gradients.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mambactl.kernels.launch import launch_options, rounded
from mambactl.kernels.sequence.pointwise import exact_silu, in_rows

# numbers that a program works on, unless one row has more
BLOCK = 1024
MOST_WARPS = 16


@triton.jit
def _unit_rows(x, eps, W: tl.constexpr):
    """Rows [R, W] divided by the root of their mean square; columns behind W hold 0."""
    return x * tl.rsqrt(tl.sum(x * x, axis=1) / W + eps)[:, None]


@triton.jit(do_not_specialize=["rows"])
def _norm_kernel(
    x, weight, y, rows, x_row, eps, W: tl.constexpr, BR: tl.constexpr, BW: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)[:, None]
    col = tl.arange(0, BW)[None, :]
    ok = (row < rows) & (col < W)
    kind: tl.constexpr = y.dtype.element_ty
    raw = tl.load(x + row * x_row + col, mask=ok, other=0.0).to(tl.float32)
    normed = rounded(_unit_rows(raw, eps, W), kind).to(tl.float32)
    gain = tl.load(weight + col, mask=col < W, other=0.0).to(tl.float32)
    tl.store(y + row * W + col, rounded(normed * gain, kind), mask=ok)


@triton.jit
def _gated_norm_kernel(
    y, z, x, D, weight, out, y_row, z_row, x_row, eps, G: tl.constexpr, W: tl.constexpr,
    P: tl.constexpr, SHARED: tl.constexpr, BG: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """BG of the G groups of one row; SHARED heads have one head of x."""
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * BG + tl.arange(0, BG)[:, None]
    col = tl.arange(0, BW)[None, :]
    ok = (group < G) & (col < W)
    ch = group * W + col
    head = ch // P
    mixed = tl.load(y + row * y_row + ch, mask=ok, other=0.0).to(tl.float32)
    own = tl.load(x + row * x_row + head // SHARED * P + ch % P, mask=ok, other=0.0)
    mixed += tl.load(D + head, mask=ok, other=0.0).to(tl.float32) * own.to(tl.float32)
    mixed *= exact_silu(tl.load(z + row * z_row + ch, mask=ok, other=0.0).to(tl.float32))
    gain = tl.load(weight + ch, mask=ok, other=0.0).to(tl.float32)
    mixed = _unit_rows(mixed, eps, W) * gain
    tl.store(out + row * (G * W) + ch, rounded(mixed, out.dtype.element_ty), mask=ok)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`kernels.reference.rms_norm` of x [..., D] and weight [D] of one dtype.

    The result lies in memory in the order of x where that is heads [B, H, T, D] of a projection.
    """
    if x.ndim == 4 and x.stride(1) < x.stride(2):
        return rms_norm(x.transpose(1, 2), weight, eps).transpose(1, 2)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    x = in_rows(x)
    rows, width = x.shape
    block, at_once, options = _tile(width)
    _norm_kernel[(triton.cdiv(rows, at_once),)](
        x, weight.contiguous(), y, rows, x.stride(0), eps, W=width, BR=at_once, BW=block, **options
    )
    return y


def gated_norm(
    y: Tensor,
    z: Tensor,
    x: Tensor,
    D: Tensor,
    weight: Tensor,
    groups: int,
    eps: float,
    kind: torch.dtype,
) -> Tensor:
    """`kernels.reference.gated_norm` with any of bf16, fp16 and fp32 for any of its tensors."""
    out = torch.empty(z.shape, dtype=kind, device=z.device)
    heads, size = y.shape[-2:]
    shared = heads // x.shape[-2]
    y, z, x = in_rows(y.flatten(-2)), in_rows(z), in_rows(x.flatten(-2))
    width = z.shape[1] // groups
    block, at_once, options = _tile(width)
    at_once = min(at_once, triton.next_power_of_2(groups))
    _gated_norm_kernel[(z.shape[0], triton.cdiv(groups, at_once))](
        y, z, x, D.contiguous(), weight.contiguous(), out, y.stride(0), z.stride(0), x.stride(0),
        eps, G=groups, W=width, P=size, SHARED=shared, BG=at_once, BW=block, **options,
    )  # fmt: skip
    return out


def _tile(width: int) -> tuple[int, int, dict[str, object]]:
    """Columns and rows of a program that takes whole rows of that width, and its options."""
    columns = triton.next_power_of_2(width)
    rows = max(BLOCK // columns, 1)
    warps = min(max(rows * columns // 512, 4), MOST_WARPS)
    return columns, rows, launch_options(False, num_warps=warps, enable_fp_fusion=False)
