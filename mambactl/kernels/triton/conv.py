"""Depthwise causal convolution and SiLU of whole prompts, in fp32 with one rounding at the end."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mambactl.kernels.triton.launch import launch_options
from mambactl.kernels.triton.mamba2 import silu

BLOCK_T = 16
BLOCK_C = 128


@triton.jit
def _conv_kernel(
    x, weight, bias, window, y, T, CH, x_b, x_t, w_b, w_t,
    W: tl.constexpr, BIAS: tl.constexpr, WINDOW: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    ch = tl.program_id(0) * BC + tl.arange(0, BC)
    t = tl.program_id(1) * BT + tl.arange(0, BT)
    b = tl.program_id(2).to(tl.int64)
    ok = ch < CH
    x += b * x_b + ch[None, :]
    acc = tl.zeros([BT, BC], tl.float32)
    for back in tl.static_range(W):
        at = (t - back)[:, None]
        inside = (at >= 0) & (t < T)[:, None] & ok[None, :]
        raw = tl.load(x + at.to(tl.int64) * x_t, mask=inside, other=0.0).to(tl.float32)
        if WINDOW and back > 0:
            before = (at < 0) & (t < T)[:, None] & ok[None, :]
            place = window + b * w_b + (at + W - 1) * w_t + ch[None, :]
            raw += tl.load(place, mask=before, other=0.0).to(tl.float32)
        acc += raw * tl.load(weight + ch * W + W - 1 - back, mask=ok, other=0.0).to(tl.float32)
    if BIAS:
        acc += tl.load(bias + ch, mask=ok, other=0.0).to(tl.float32)
    place = y + (b * T + t)[:, None] * CH + ch[None, :]
    tl.store(place, silu(acc).to(y.dtype.element_ty), mask=(t < T)[:, None] & ok[None, :])


def causal_conv1d_silu(
    x: Tensor, weight: Tensor, bias: Tensor | None, window: Tensor | None = None
) -> Tensor:
    """SiLU of `kernels.reference.causal_conv1d` without documents, in the dtype of x.

    x [B, T, Ch] and window [B, W-1, Ch] with any strides, weight [Ch, W], bias [Ch].
    """
    batch, length, channels = x.shape
    x = x if x.stride(2) == 1 else x.contiguous()
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    before = x if window is None else window
    before = before if before.stride(2) == 1 else before.contiguous()
    grid = (triton.cdiv(channels, BLOCK_C), triton.cdiv(length, BLOCK_T), batch)
    _conv_kernel[grid](
        x, weight.contiguous(), weight if bias is None else bias.contiguous(), before, y, length,
        channels, *x.stride()[:2], *before.stride()[:2], W=weight.shape[1], BIAS=bias is not None,
        WINDOW=window is not None, BT=BLOCK_T, BC=BLOCK_C, **launch_options(False, num_warps=4),
    )  # fmt: skip
    return y
