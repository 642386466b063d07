"""Depthwise causal convolution and SiLU of whole rows, in fp32 with one rounding at the end."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mambactl.kernels.decode.triton.mamba2_step import silu
from mambactl.kernels.launch import launch_options, rounded

BLOCK_T = 16
BLOCK_C = 128
BACKWARD_T = 64
BACKWARD_C = 128
BACKWARD_STEP = 4


@triton.jit
def tap(
    x, previous, documents, t, same, T, ch, ok, x_t, w_t, back: tl.constexpr, W: tl.constexpr,
    PREVIOUS: tl.constexpr, DOCUMENTS: tl.constexpr,
):  # fmt: skip
    """Inputs `back` tokens before t [L, Ch] of the same document, and which t have one.

    `same` says so of the tokens back - 1 before t.
    """
    at = t - back
    inside = t < T
    if DOCUMENTS and back > 0:
        # what came before the row belongs to its first document
        number = tl.load(documents + tl.maximum(at, 0), mask=inside, other=0)
        after = tl.load(documents + tl.maximum(at + 1, 0), mask=inside, other=0)
        same = same & (number == after)
    live = (inside & same & (at >= 0))[:, None] & ok[None, :]
    raw = tl.load(x + at.to(tl.int64)[:, None] * x_t + ch[None, :], mask=live, other=0.0)
    raw = raw.to(tl.float32)
    if PREVIOUS and back > 0:
        before = (inside & same & (at < 0))[:, None] & ok[None, :]
        pointer = previous + (at + W - 1)[:, None] * w_t + ch[None, :]
        raw += tl.load(pointer, mask=before, other=0.0).to(tl.float32)
    return raw, same


@triton.jit
def weigh(
    x, weight, bias, previous, documents, t, T, ch, ok, x_t, w_t, W: tl.constexpr,
    BIAS: tl.constexpr, PREVIOUS: tl.constexpr, DOCUMENTS: tl.constexpr,
):  # fmt: skip
    """The convolution at t [L, Ch], before the SiLU."""
    acc = tl.zeros([t.shape[0], ch.shape[0]], tl.float32)
    same = t >= 0
    for back in tl.static_range(W):
        raw, same = tap(
            x, previous, documents, t, same, T, ch, ok, x_t, w_t, back, W, PREVIOUS, DOCUMENTS
        )
        acc += raw * tl.load(weight + ch * W + W - 1 - back, mask=ok, other=0.0).to(tl.float32)
    if BIAS:
        acc += tl.load(bias + ch, mask=ok, other=0.0).to(tl.float32)
    return acc


@triton.jit
def _conv_kernel(
    x, weight, bias, previous, documents, y, T, CH, x_b, x_t, w_b, w_t,
    W: tl.constexpr, BIAS: tl.constexpr, PREVIOUS: tl.constexpr, DOCUMENTS: tl.constexpr,
    BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    ch = tl.program_id(0) * BC + tl.arange(0, BC)
    t = tl.program_id(1) * BT + tl.arange(0, BT)
    b = tl.program_id(2).to(tl.int64)
    ok = ch < CH
    acc = weigh(
        x + b * x_b, weight, bias, previous + b * w_b, documents + b * T, t, T, ch, ok, x_t, w_t, W,
        BIAS, PREVIOUS, DOCUMENTS,
    )  # fmt: skip
    pointer = y + (b * T + t)[:, None] * CH + ch[None, :]
    acc = rounded(silu(acc), y.dtype.element_ty)
    tl.store(pointer, acc, mask=(t < T)[:, None] & ok[None, :])


@triton.jit
def _input(x, previous, t, T, ch, ok, x_t, w_t, W: tl.constexpr, PREVIOUS: tl.constexpr):
    """Inputs [Ch] at t in fp32; the W - 1 before the row are those of `previous`."""
    live = ok & (t >= 0) & (t < T)
    found = tl.load(x + t.to(tl.int64) * x_t + ch, mask=live, other=0.0).to(tl.float32)
    if PREVIOUS:
        pointer = previous + (t + W - 1) * w_t + ch
        found += tl.load(pointer, mask=ok & (t < 0), other=0.0).to(tl.float32)
    return found


@triton.jit
def _aged(age, documents, t, T):
    """Tokens between the first of a document and its token at t, given those at t - 1."""
    later = (t > 0) & (t < T)
    number = tl.load(documents + t, mask=later, other=0)
    before = tl.load(documents + t - 1, mask=later, other=0)
    return tl.where(number == before, age + 1, 0)


@triton.jit
def _backward_kernel(
    dy, x, weight, bias, previous, documents, dx, sums, T, CH, y_b, y_t, x_b, x_t, w_b, w_t,
    W: tl.constexpr, BIAS: tl.constexpr, PREVIOUS: tl.constexpr, DOCUMENTS: tl.constexpr,
    BT: tl.constexpr, STEP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """One token after the other, with the last W - 1 inputs and their gradients in registers.

    So everything is read once and the gate is made once. STEP tokens are on their way at a time.
    """
    ch = tl.program_id(0) * BC + tl.arange(0, BC)
    begin, b = tl.program_id(1) * BT, tl.program_id(2).to(tl.int64)
    end, ok = begin + BT, ch < CH
    x += b * x_b
    previous += b * w_b
    documents += b * T
    dy += b * y_b
    dx += b * T * CH
    part = b * tl.num_programs(1) + tl.program_id(1)
    sums += part * (W + 1) * CH + ch
    nothing = tl.zeros([BC], tl.float32)
    shift, d_shift = nothing, nothing
    if BIAS:
        shift += tl.load(bias + ch, mask=ok, other=0.0).to(tl.float32)
    scales = ()  # of the input 0, 1, ... tokens back
    d_scales = ()
    past = ()  # inputs 1, 2, ... tokens back, and what is known of their gradients
    d_past = ()
    age = tl.full([], W, tl.int32)
    for back in tl.static_range(W):
        scale = tl.load(weight + ch * W + W - 1 - back, mask=ok, other=0.0).to(tl.float32)
        scales = scales + (scale,)
        d_scales = d_scales + (nothing,)
        if back > 0:
            past = past + (_input(x, previous, begin - back, T, ch, ok, x_t, w_t, W, PREVIOUS),)
            d_past = d_past + (nothing,)
            if DOCUMENTS:
                age = _aged(age, documents, begin - W + back, T)
    # the last tokens of a tile get gradients from the first of the next one
    for first in range(begin, end + W - 1, STEP):
        values = ()
        grads = ()
        for k in tl.static_range(STEP):
            t = first + k
            values = values + (_input(x, previous, t, T, ch, ok, x_t, w_t, W, PREVIOUS),)
            pointer = dy + t.to(tl.int64) * y_t + ch
            grads = grads + (tl.load(pointer, mask=ok & (t < T), other=0.0).to(tl.float32),)
        for k in tl.static_range(STEP):
            t, value = first + k, values[k]
            if DOCUMENTS:
                age = _aged(age, documents, t, T)
            raw = shift + scales[0] * value
            for back in tl.static_range(1, W):
                more = raw + scales[back] * past[back - 1]
                raw = tl.where(back <= age, more, raw) if DOCUMENTS else more
            gate = tl.sigmoid(raw)
            grad = grads[k] * gate * (1.0 + raw * (1.0 - gate))  # of what SiLU saw
            counted = tl.where(t < end, grad, 0.0)
            d_shift += counted
            summed = (d_scales[0] + counted * value,)
            reached = (scales[0] * grad,)
            for back in tl.static_range(1, W):
                change = d_scales[back] + counted * past[back - 1]
                more = d_past[back - 1] + scales[back] * grad
                if DOCUMENTS:
                    change = tl.where(back <= age, change, d_scales[back])
                    more = tl.where(back <= age, more, d_past[back - 1])
                summed = summed + (change,)
                reached = reached + (more,)
            done = t - (W - 1)
            live = ok & (done >= begin) & (done < tl.minimum(end, T))
            pointer = dx + done.to(tl.int64) * CH + ch
            tl.store(pointer, rounded(reached[W - 1], dx.dtype.element_ty), mask=live)
            past = (value,) + past[: W - 2]
            d_past, d_scales = reached[: W - 1], summed
    for back in tl.static_range(W):
        tl.store(sums + (W - 1 - back) * CH, d_scales[back], mask=ok)
    tl.store(sums + W * CH, d_shift, mask=ok)


def causal_conv1d_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    previous: Tensor | None = None,
    documents: Tensor | None = None,
) -> Tensor:
    """SiLU of `kernels.reference.causal_conv1d` in the dtype of x.

    x [B, T, Ch] and previous [B, W-1, Ch] with any strides, weight [Ch, W], bias [Ch]; documents
    [B, T] int32 and contiguous.
    """
    batch, length, channels = x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    grid = (triton.cdiv(channels, BLOCK_C), triton.cdiv(length, BLOCK_T), batch)
    arguments, sizes = _inputs(x, weight, bias, previous, documents)
    x, before = arguments[0], arguments[3]
    _conv_kernel[grid](
        *arguments, y, length, channels, *x.stride()[:2], *before.stride()[:2], **sizes,
        BT=BLOCK_T, BC=BLOCK_C, **launch_options(False, num_warps=4),
    )  # fmt: skip
    return y


def causal_conv1d_silu_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    previous: Tensor | None,
    documents: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x [B, T, Ch], in its dtype, and of weight [Ch, W] and bias [Ch], fp32."""
    batch, length, channels = x.shape
    dy = dy if dy.stride(2) == 1 else dy.contiguous()
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    tiles = triton.cdiv(length, BACKWARD_T)
    width = weight.shape[1]
    # every program leaves its part: no sum depends on the order in which they run
    sums = dx.new_empty(batch * tiles, width + 1, channels, dtype=torch.float32)
    arguments, sizes = _inputs(x, weight, bias, previous, documents)
    x, before = arguments[0], arguments[3]
    _backward_kernel[(triton.cdiv(channels, BACKWARD_C), tiles, batch)](
        dy, *arguments, dx, sums, length, channels, *dy.stride()[:2], *x.stride()[:2],
        *before.stride()[:2], **sizes, BT=BACKWARD_T, STEP=BACKWARD_STEP, BC=BACKWARD_C,
        **launch_options(False, num_warps=1),
    )  # fmt: skip
    whole = sums.sum(0)  # [W + 1, Ch]
    return dx, whole[:width].t().contiguous(), whole[width].clone()


def _inputs(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    previous: Tensor | None,
    documents: Tensor | None,
) -> tuple[tuple[Tensor, ...], dict[str, int]]:
    """x, weight, bias, previous, documents; any tensor stands for one that is missing."""
    x = x if x.stride(2) == 1 else x.contiguous()
    before = x if previous is None else previous
    before = before if before.stride(2) == 1 else before.contiguous()
    shift = weight if bias is None else bias.contiguous()
    numbers = x if documents is None else documents
    switches = {
        "W": weight.shape[1],
        "BIAS": bias is not None,
        "PREVIOUS": previous is not None,
        "DOCUMENTS": documents is not None,
    }
    return (x, weight.contiguous(), shift, before, numbers), switches
