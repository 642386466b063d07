"""The gate of an MLP and the rotation of queries and keys, in one kernel each.

Every operation rounds as PyTorch's own does, to the dtype of its operands: results are those of
`kernels.reference` to the bit. Nothing here has gradients.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import libdevice

from mambactl.kernels.launch import INTERPRETED, launch_options, rounded

BLOCK = 1024
_INTERPRETED = tl.constexpr(INTERPRETED)
# a product that is fused with the sum behind it is not rounded
OPTIONS = launch_options(False, num_warps=4, enable_fp_fusion=False)


@triton.jit
def exact_silu(x):
    """x / (1 + exp(-x)) rounded as PyTorch's: `tl.exp` and `/` are approximations."""
    e = tl.exp(-x) if _INTERPRETED else libdevice.exp(-x)
    return tl.div_rn(x, 1.0 + e)


@triton.jit
def _swiglu_kernel(gate, up, y, gate_row, up_row, W: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ok = col < W
    kind: tl.constexpr = y.dtype.element_ty
    open_ = exact_silu(tl.load(gate + row * gate_row + col, mask=ok, other=0.0).to(tl.float32))
    value = tl.load(up + row * up_row + col, mask=ok, other=0.0).to(tl.float32)
    product = rounded(open_, kind).to(tl.float32) * value
    tl.store(y + row * W + col, rounded(product, kind), mask=ok)


@triton.jit(do_not_specialize=["rows", "J", "K"])
def _rotate_kernel(
    x, cos, sin, y, rows, J, K, x_i, x_j, x_k, cos_i, cos_j, cos_k, sin_i, sin_j, sin_k,
    y_i, y_j, y_k, HALF: tl.constexpr, BR: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """Rows are those of [I, J, K, 2 HALF]."""
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)[:, None]
    col = tl.arange(0, BH)[None, :]
    ok = (row < rows) & (col < HALF)
    i, j, k = row // K // J, row // K % J, row % K
    kind: tl.constexpr = y.dtype.element_ty
    x += i * x_i + j * x_j + k * x_k + col
    cos += i * cos_i + j * cos_j + k * cos_k + col
    sin += i * sin_i + j * sin_j + k * sin_k + col
    y += i * y_i + j * y_j + k * y_k + col
    one = tl.load(x, mask=ok, other=0.0).to(tl.float32)
    other = tl.load(x + HALF, mask=ok, other=0.0).to(tl.float32)
    low = rounded(one * tl.load(cos, mask=ok, other=0.0).to(tl.float32), kind).to(tl.float32)
    crossed = rounded(-other * tl.load(sin, mask=ok, other=0.0).to(tl.float32), kind)
    tl.store(y, rounded(low + crossed.to(tl.float32), kind), mask=ok)
    high = tl.load(cos + HALF, mask=ok, other=0.0).to(tl.float32)
    high = rounded(other * high, kind).to(tl.float32)
    crossed = rounded(one * tl.load(sin + HALF, mask=ok, other=0.0).to(tl.float32), kind)
    tl.store(y + HALF, rounded(high + crossed.to(tl.float32), kind), mask=ok)


def in_rows(t: Tensor) -> Tensor:
    """t [..., D] as [M, D] whose columns lie next to each other, copied only if it must be."""
    t = t.reshape(-1, t.shape[-1])
    return t if t.stride(1) == 1 else t.contiguous()


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`kernels.reference.swiglu` of two tensors [..., D] of one dtype."""
    y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    gate, up = in_rows(gate), in_rows(up)
    rows, width = gate.shape
    _swiglu_kernel[(rows, triton.cdiv(width, BLOCK))](
        gate, up, y, gate.stride(0), up.stride(0), W=width, BLOCK=BLOCK, **OPTIONS
    )
    return y


def rotated(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`kernels.reference.rotated` of states [I, J, K, N] with cosines and sines that broadcast.

    The result lies in memory in the order of `states`.
    """
    if states.stride(1) < states.stride(2):
        # heads of a projection lie next to each other
        parts = (t.expand(states.shape).transpose(1, 2) for t in (states, cos, sin))
        return _rotate(*parts).transpose(1, 2)
    return _rotate(states, cos.expand(states.shape), sin.expand(states.shape))


def _rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    y = torch.empty(states.shape, dtype=states.dtype, device=states.device)
    states, cos, sin = (t if t.stride(3) == 1 else t.contiguous() for t in (states, cos, sin))
    half = states.shape[3] // 2
    block = triton.next_power_of_2(half)
    at_once = max(BLOCK // block, 1)
    rows = states.shape[:3].numel()
    strides = [stride for t in (states, cos, sin, y) for stride in t.stride()[:3]]
    _rotate_kernel[(triton.cdiv(rows, at_once),)](
        states, cos, sin, y, rows, *states.shape[1:3], *strides, HALF=half, BR=at_once, BH=block,
        **OPTIONS,
    )  # fmt: skip
    return y
