"""KL(teacher || student) and cross entropy through the language-model head, chunked over tokens.

The gradient of both with respect to the logits is a difference of probabilities, so each chunk of
logits is made, used for value and gradient, and dropped: no [tokens, vocabulary] tensor outlives
its chunk, in the forward or in the backward pass. Softmax, sums and gradients are fp32.
Hinton et al. 2015 (arXiv 1503.02531) for the temperature squared.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

# largest number of logits alive in one tensor: 64 MiB of fp32 on a CPU, 256 MiB on a GPU
CHUNK_ELEMENTS = {"cpu": 1 << 24, "cuda": 1 << 26}


class Teacher(NamedTuple):
    """Where the teacher's logits come from: hidden [N, Dt] before its head, weight [V, Dt]."""

    hidden: Tensor
    weight: Tensor


class Losses(NamedTuple):
    """Sums over tokens, fp32 scalars; only `total` carries a gradient."""

    total: Tensor
    kl: Tensor
    ce: Tensor


class _Setting(NamedTuple):
    kl_weight: float
    ce_weight: float
    temperature: float
    chunk: int
    dtype: torch.dtype


def distillation_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    mask: Tensor,
    teacher: Teacher | None = None,
    kl_weight: float = 1.0,
    ce_weight: float = 0.0,
    temperature: float = 1.0,
    chunk: int | None = None,
) -> Losses:
    """Sum over masked tokens of kl_weight * T^2 * KL(teacher || student) + ce_weight * CE.

    hidden [..., D] is the student's state that predicts targets [...]; weight [V, D]; mask [...]
    bool; the teacher's hidden has the same leading shape. KL compares the softmax of logits / T,
    CE has no temperature. Divide by `mask.sum()` for the mean. Raises ValueError for vocabularies
    of different size.
    """
    if teacher is not None and teacher.weight.shape[0] != weight.shape[0]:
        raise ValueError(f"vocabularies differ: {teacher.weight.shape[0]} and {weight.shape[0]}")
    device = hidden.device.type
    elements = CHUNK_ELEMENTS.get(device, CHUNK_ELEMENTS["cuda"])
    setting = _Setting(
        kl_weight if teacher is not None else 0.0,
        ce_weight,
        temperature,
        chunk or max(1, elements // weight.shape[0]),
        torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype,
    )
    other = Teacher(teacher.hidden[mask], teacher.weight) if teacher is not None else None
    with torch.autocast(device, enabled=False):
        return Losses(*_HeadLoss.apply(hidden[mask], weight, targets[mask], other, setting))


class _HeadLoss(torch.autograd.Function):
    """Value and gradient in one sweep over chunks; backward only scales what forward made."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        teacher: Teacher | None,
        setting: _Setting,
    ) -> tuple[Tensor, Tensor, Tensor]:
        head = weight.to(setting.dtype)
        teacher_head = teacher.weight.to(setting.dtype) if teacher is not None else None
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        hidden_grad = torch.zeros_like(hidden) if wants_hidden else None
        exact = torch.promote_types(hidden.dtype, torch.float32)
        weight_grad = torch.zeros_like(weight, dtype=exact) if wants_weight else None
        kl, ce = hidden.new_zeros((), dtype=exact), hidden.new_zeros((), dtype=exact)
        for start in range(0, len(hidden), setting.chunk):
            piece = slice(start, start + setting.chunk)
            student = hidden[piece].to(setting.dtype)
            guide = None
            if teacher is not None:
                guide = _logits(teacher.hidden[piece].to(setting.dtype), teacher_head)
            logits = _logits(student, head)
            grad, chunk_kl, chunk_ce = _chunk(logits, guide, targets[piece], setting)
            kl += chunk_kl
            ce += chunk_ce
            grad = grad.to(setting.dtype)
            if wants_hidden:
                hidden_grad[piece] = grad @ head
            if wants_weight:
                weight_grad += grad.t() @ student
        ctx.save_for_backward(hidden_grad, weight_grad)
        ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(kl, ce)
        return setting.kl_weight * kl + setting.ce_weight * ce, kl, ce

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        hidden_grad, weight_grad = ctx.saved_tensors
        if hidden_grad is not None:
            hidden_grad = hidden_grad * upstream
        if weight_grad is not None:
            weight_grad = (weight_grad * upstream).to(ctx.weight_dtype)
        return hidden_grad, weight_grad, None, None, None


def _logits(hidden: Tensor, head: Tensor) -> Tensor:
    # rounding logits of size 20 to bf16 would cost 0.06 nats: keep the fp32 accumulator
    if hidden.is_cuda and hidden.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(hidden, head.t(), out_dtype=torch.float32)
    return (hidden @ head.t()).to(torch.promote_types(hidden.dtype, torch.float32))


def _chunk(
    logits: Tensor, guide: Tensor | None, targets: Tensor, setting: _Setting
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient with respect to the logits [n, V], KL sum and CE sum of one chunk."""
    log_p = functional.log_softmax(logits, dim=-1)
    ce = -log_p.gather(-1, targets[:, None]).sum()
    grad = log_p.exp().mul_(setting.ce_weight)
    grad.scatter_add_(-1, targets[:, None], grad.new_full((len(targets), 1), -setting.ce_weight))
    if guide is None:
        return grad, ce.new_zeros(()), ce
    if setting.temperature != 1.0:
        log_p = functional.log_softmax(logits / setting.temperature, dim=-1)
    log_q = functional.log_softmax(guide / setting.temperature, dim=-1)
    q = log_q.exp()
    kl = (q * (log_q - log_p)).sum() * setting.temperature**2
    # d(T^2 KL) / d logits = T (p - q)
    grad.add_(log_p.exp_().sub_(q), alpha=setting.kl_weight * setting.temperature)
    return grad, kl, ce
