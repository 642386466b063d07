"""Triton kernels with gradients as torch operators, which `torch.compile` takes whole.

A backward pass is an operator of its own: nothing is differentiated twice. Arguments are those of
the kernels: bf16 or fp32, dt and A and states fp32, documents [B, T] int32 and contiguous. None is
returned for a gradient that nobody can want: that of the inputs before a row. The convolution of a
wide input runs in causal-conv1d where that leads: what is seen from outside stays the same.
"""

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from mambactl.kernels import mamba_ssm_calls

Gradients = tuple[Tensor | None, ...]


@custom_op(
    "mambactl::ssd",
    mutates_args=(),
    schema="(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? initial_state, "
    "Tensor? documents) -> (Tensor, Tensor, Tensor)",
)
def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    initial_state: Tensor | None,
    documents: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run `kernels.sequence.ssd.scan` in chunks of one tile, y [B, T, H, P] in the dtype of x."""
    from mambactl.kernels.sequence.ssd import BLOCKS, scan

    with torch.cuda.device_of(x):
        return scan(x, dt, A, B, C, initial_state, documents, BLOCKS[x.dtype].tile, y_dtype=x.dtype)


@ssd.register_fake
def _(x, dt, A, B, C, initial_state, documents):
    from mambactl.kernels.sequence.ssd import BLOCKS

    (batch, length, heads), width, size = dt.shape, x.shape[3], B.shape[3]
    chunks = -(-length // BLOCKS[x.dtype].tile)
    return (
        x.new_empty(batch, length, heads, width),
        x.new_empty(batch, heads, width, size, dtype=torch.float32),
        x.new_empty(batch, heads, chunks, width, size),
    )


@custom_op(
    "mambactl::ssd_backward",
    mutates_args=(),
    schema="(Tensor dy, Tensor? d_final, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, "
    "Tensor? documents, Tensor entering) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _ssd_backward(
    dy: Tensor,
    d_final: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    documents: Tensor | None,
    entering: Tensor,
) -> tuple[Tensor, ...]:
    from mambactl.kernels.sequence.ssd_backward import ssd_backward

    with torch.cuda.device_of(x):
        return tuple(ssd_backward(dy, d_final, x, dt, A, B, C, documents, entering=entering))


@_ssd_backward.register_fake
def _(dy, d_final, x, dt, A, B, C, documents, entering):
    batch, heads, _, width, size = entering.shape
    shapes = [t.new_empty(t.shape) for t in (x, dt, A, B, C)]
    return *shapes, x.new_empty(batch, heads, width, size, dtype=torch.float32)


def _keep_ssd(ctx: Any, inputs: tuple, output: tuple) -> None:
    *needed, initial_state, documents = inputs
    ctx.save_for_backward(*needed, documents, output[2])
    ctx.started = initial_state is not None
    ctx.set_materialize_grads(False)


def _return_ssd(ctx: Any, dy: Tensor | None, d_final: Tensor | None, _: None) -> Gradients:
    x, dt, A, B, C, documents, entering = ctx.saved_tensors
    if dy is None:
        dy = x.new_zeros(*dt.shape, x.shape[3])
    *gradients, initial_state = _ssd_backward(
        dy, d_final, x, dt, A, B, C, documents, entering=entering
    )
    return *gradients, initial_state if ctx.started else None, None


ssd.register_autograd(_return_ssd, setup_context=_keep_ssd)


@custom_op(
    "mambactl::conv_silu",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? bias, Tensor? previous, Tensor? documents) -> Tensor",
)
def conv_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    previous: Tensor | None,
    documents: Tensor | None,
) -> Tensor:
    """Run `kernels.sequence.conv.causal_conv1d_silu`, or causal-conv1d, as an operator."""
    if mamba_ssm_calls.conv_leads(x, weight, bias, previous, documents, mamba_ssm_calls.CONV_WIDE):
        return mamba_ssm_calls.conv_silu(x, weight, bias, previous, documents)
    from mambactl.kernels.sequence.conv import causal_conv1d_silu

    with torch.cuda.device_of(x):
        return causal_conv1d_silu(x, weight, bias, previous, documents)


@conv_silu.register_fake
def _(x, weight, bias, previous, documents):
    return x.new_empty(x.shape)


@custom_op(
    "mambactl::conv_silu_backward",
    mutates_args=(),
    schema="(Tensor dy, Tensor x, Tensor weight, Tensor? bias, Tensor? previous, "
    "Tensor? documents) -> (Tensor, Tensor, Tensor)",
)
def _conv_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    previous: Tensor | None,
    documents: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    if mamba_ssm_calls.conv_leads(x, weight, bias, previous, documents, mamba_ssm_calls.CONV_WIDE):
        return mamba_ssm_calls.conv_silu_backward(dy, x, weight, bias)
    from mambactl.kernels.sequence.conv import causal_conv1d_silu_backward

    with torch.cuda.device_of(x):
        return causal_conv1d_silu_backward(dy, x, weight, bias, previous, documents)


@_conv_backward.register_fake
def _(dy, x, weight, bias, previous, documents):
    channels, width = weight.shape
    sums = x.new_empty(channels, width, dtype=torch.float32)
    return x.new_empty(x.shape), sums, x.new_empty(channels, dtype=torch.float32)


def _keep_conv(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _return_conv(ctx: Any, dy: Tensor) -> Gradients:
    x, weight, bias, previous, documents = ctx.saved_tensors
    dx, d_weight, d_bias = _conv_backward(dy, x, weight, bias, previous, documents)
    d_bias = None if bias is None else d_bias.to(bias.dtype)
    return dx, d_weight.to(weight.dtype), d_bias, None, None


conv_silu.register_autograd(_return_conv, setup_context=_keep_conv)


@custom_op(
    "mambactl::attend",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor starts, Tensor ends) -> (Tensor, Tensor)",
)
def attend(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    """Run `kernels.sequence.packed_attention.attend`; `ends` is for the backward pass."""
    from mambactl.kernels.sequence import packed_attention

    with torch.cuda.device_of(q):
        return packed_attention.attend(q, k, v, starts)


@attend.register_fake
def _(q, k, v, starts, ends):
    batch, heads, length, width = q.shape
    sums = q.new_empty(batch, heads, length, dtype=torch.float32)
    return q.new_empty(batch, length, heads, width), sums


@custom_op(
    "mambactl::attend_backward",
    mutates_args=(),
    schema="(Tensor dy, Tensor q, Tensor k, Tensor v, Tensor starts, Tensor ends, Tensor y, "
    "Tensor sums) -> (Tensor, Tensor, Tensor)",
)
def _attend_backward(
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    ends: Tensor,
    y: Tensor,
    sums: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    from mambactl.kernels.sequence import packed_attention

    with torch.cuda.device_of(q):
        # the operator's y and dy are [B, T, H, P]
        dy = dy.transpose(1, 2)
        return packed_attention.attend_backward(dy, q, k, v, starts, ends, y, sums)


@_attend_backward.register_fake
def _(dy, q, k, v, starts, ends, y, sums):
    return tuple(t.new_empty(t.transpose(1, 2).shape).transpose(1, 2) for t in (q, k, v))


def _keep_attend(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(*inputs, *output)
    ctx.set_materialize_grads(False)


def _return_attend(ctx: Any, dy: Tensor | None, _: None) -> Gradients:
    if dy is None:
        return (None,) * 5
    return *_attend_backward(dy, *ctx.saved_tensors), None, None


attend.register_autograd(_return_attend, setup_context=_keep_attend)
