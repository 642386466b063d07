"""Distances to a teacher and cross entropy through the language-model head, in chunks of tokens.

The gradient with respect to the logits is known as soon as they are, so each chunk of logits is
made, used for value and gradient, and overwritten: no [tokens, vocabulary] tensor of logits exists
in the forward or in the backward pass. `kernels.divergence` has the formulas.

Precision on CUDA. Logits keep the fp32 accumulator: of size 20 they would be off by 0.06 nats in
bf16. That is 12 bytes more per token and word, written and read: 3 ms by arithmetic where the
products of an 8B model's head (8,192 x 4,096 x 128,256) take 50. fp32 matrices that mixed precision
has to round are rounded to fp16 and not to bf16, at the same speed with 8 times smaller an error;
what would overflow or vanish in fp16 (a normed state, a head's weight, the scaled gradient) is far
outside of what training meets. Matrices that come in 16 bits stay as they are.
A CPU multiplies in fp32 whatever the autocast.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mambactl.kernels import divergence as reference
from mambactl.kernels.dispatch import triton_missing
from mambactl.kernels.divergence import DIVERGENCES, Samples, Terms
from mambactl.present import present

HALVES = (torch.bfloat16, torch.float16)
# largest number of logits alive in one tensor: 64 MiB of fp32 on a CPU, 256 MiB on a GPU
CHUNK_ELEMENTS = {"cpu": 1 << 24, "cuda": 1 << 26}
TILE = 256
# bytes of gradients of logits kept on a GPU until they are multiplied for the weight at once; less
# would add up more often what is as large as the weight
GROUP_BYTES = 1 << 31
# a gradient entry is at most `match * T * |log p / q| + ce`: this leaves 2^8 for the ratio
HALF_SCALE = 2**8
# parts in which the fp32 gradient of the weight is added to, so that no second one exists
SLABS = 8


class Teacher(NamedTuple):
    """Source of the teacher's logits: hidden [..., Dt] before its head, weight [V, Dt]."""

    hidden: Tensor
    weight: Tensor


class SampledTeacher(NamedTuple):
    """Ids [..., K] drawn from the teacher, their weights [..., K], and its entropy [...] in nats.

    They give an unbiased estimate of the forward KL and of its gradient.
    """

    ids: Tensor
    masses: Tensor
    entropy: Tensor


class Losses(NamedTuple):
    """Sums over tokens, fp32 scalars; only `total` carries a gradient. `kl` is the divergence."""

    total: Tensor
    kl: Tensor
    ce: Tensor


class _Setting(NamedTuple):
    terms: Terms
    chunk: int
    group: int
    dtype: torch.dtype


def distillation_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    mask: Tensor,
    teacher: Teacher | SampledTeacher | None = None,
    kl_weight: float = 1.0,
    ce_weight: float = 0.0,
    temperature: float = 1.0,
    chunk: int | None = None,
    divergence: str = "forward",
    beta: float = 0.5,
) -> Losses:
    """Sum over masked tokens of kl_weight * T^2 * divergence(teacher, student) + ce_weight * CE.

    hidden [..., D] is the student's state that predicts targets [...]; weight [V, D]; mask [...]
    bool; what the teacher holds has the same leading shape. `divergence` is forward, reverse or jsd
    (with `beta`); it compares softmaxes of logits / T, CE has no temperature. Divide by
    `mask.sum()` for the mean. On CUDA nothing waits for the device, and masked positions cost the
    products of others. Raises ValueError for vocabularies of different size, for an unknown
    divergence, for beta outside of (0, 1), and for samples with another than forward.
    """
    _check(weight, teacher, divergence, beta)
    match = kl_weight if teacher is not None else 0.0
    terms = Terms(divergence, beta, temperature, match, ce_weight)
    device = hidden.device.type
    setting = _setting(hidden, weight, terms, chunk)
    rows = [hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)]
    source, parts = None, ()
    if teacher is not None:
        source = teacher.weight if isinstance(teacher, Teacher) else None
        kept = (teacher.hidden,) if isinstance(teacher, Teacher) else teacher
        parts = tuple(part.reshape(targets.numel(), *part.shape[targets.ndim :]) for part in kept)
    chosen = mask.reshape(-1)
    if device == "cpu":
        # worth it where nothing runs ahead: no product for a masked position
        rows = [row[chosen] for row in rows]
        parts = tuple(part[chosen] for part in parts)
        chosen = chosen[chosen]
    with torch.autocast(device, enabled=False):
        return Losses(*_HeadLoss.apply(rows[0], weight, rows[1], chosen, parts, source, setting))


def _check(
    weight: Tensor, teacher: Teacher | SampledTeacher | None, divergence: str, beta: float
) -> None:
    if isinstance(teacher, Teacher) and teacher.weight.shape[0] != weight.shape[0]:
        raise ValueError(f"vocabularies differ: {teacher.weight.shape[0]} and {weight.shape[0]}")
    if divergence not in DIVERGENCES:
        raise ValueError(f"unknown divergence {divergence!r}: one of {', '.join(DIVERGENCES)}")
    if not 0 < beta < 1:
        raise ValueError(f"beta is {beta}, it must lie between 0 and 1")
    if isinstance(teacher, SampledTeacher) and divergence != "forward":
        raise ValueError(f"samples of the teacher estimate the forward KL, not {divergence}")


def _setting(hidden: Tensor, weight: Tensor, terms: Terms, chunk: int | None) -> _Setting:
    device, kinds = hidden.device.type, (hidden.dtype, weight.dtype)
    dtype = torch.promote_types(*kinds)
    if device == "cpu":
        dtype = torch.promote_types(dtype, torch.float32)
    elif torch.is_autocast_enabled(device) or weight.dtype in HALVES:
        dtype = weight.dtype if weight.dtype in HALVES else torch.float16
    if dtype == torch.float16:
        largest = terms.match * terms.temperature + terms.ce
        terms = terms._replace(scale=HALF_SCALE / 2.0 ** math.ceil(math.log2(largest or 1.0)))
    chunk = chunk or _chunk_rows(CHUNK_ELEMENTS.get(device, CHUNK_ELEMENTS["cuda"]), len(weight))
    kept = 1 if device == "cpu" else GROUP_BYTES // (chunk * weight.shape[0] * dtype.itemsize)
    return _Setting(terms, chunk, chunk * max(1, kept), dtype)


def _chunk_rows(elements: int, vocabulary: int) -> int:
    rows = max(1, elements // vocabulary)
    # a product computes whole tiles of rows
    return rows // TILE * TILE or rows


class _HeadLoss(torch.autograd.Function):
    """Value and gradient in one sweep over chunks; backward only scales what forward made."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        mask: Tensor,
        parts: tuple[Tensor, ...],
        source: Tensor | None,
        setting: _Setting,
    ) -> tuple[Tensor, Tensor, Tensor]:
        # Triton launches on the current device
        with torch.cuda.device_of(hidden):
            sweep = _Sweep(hidden, weight, targets, mask, parts, source, setting)
            grads = sweep.run(*ctx.needs_input_grad[:2])
        ctx.save_for_backward(*grads)
        ctx.kinds, ctx.scale = (hidden.dtype, weight.dtype), setting.terms.scale
        kl, ce = sweep.divergence.sum(), sweep.ce.sum()
        ctx.mark_non_differentiable(kl, ce)
        return setting.terms.match * kl + setting.terms.ce * ce, kl, ce

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, upstream: Tensor, *_: Tensor
    ) -> tuple[Tensor | None, ...]:
        factor = upstream / ctx.scale
        found = [
            None
            if grad is None
            else torch.mul(grad, factor, out=torch.empty_like(grad, dtype=kind))
            for grad, kind in zip(ctx.saved_tensors, ctx.kinds, strict=True)
        ]
        return *found, None, None, None, None, None


class _Sweep:
    """One pass over all rows; `divergence` and `ce` [N] hold the losses of each."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        mask: Tensor,
        parts: tuple[Tensor, ...],
        source: Tensor | None,
        setting: _Setting,
    ):
        self.terms, self.chunk, self.group, self.kind = setting
        self.student, self.head = hidden.to(self.kind), weight.to(self.kind)
        self.wide = torch.promote_types(self.kind, torch.float32)
        self.targets, self.weights = targets, mask.to(self.wide)
        self.parts, self.teacher_head = parts, None
        if source is not None:
            own = source.dtype if source.dtype in HALVES and hidden.is_cuda else self.kind
            self.teacher_head = source.to(own)
        self.divergence, self.ce = self.weights.new_empty(2, len(hidden))
        live = hidden.is_cuda and self.wide == torch.float32
        self.token_losses = reference.token_losses
        if live and triton_missing(hidden.device) is None:
            from mambactl.kernels.sequence import divergence as kernel

            self.token_losses = kernel.token_losses

    def run(self, wants_hidden: bool, wants_weight: bool) -> tuple[Tensor | None, Tensor | None]:
        """Scaled gradients [N, D] and [V, D] of the sum of all losses, those that are wanted."""
        rows, (vocabulary, width) = len(self.student), self.head.shape
        length = min(self.chunk, rows)
        logits = self._buffer(length, self.wide)
        guide = self._buffer(length, self.wide) if self.teacher_head is not None else None
        grads = None
        if wants_hidden or wants_weight:
            grads = self._buffer(min(self.group, rows), self.kind)
        hidden_grad = self.weights.new_empty(rows, width) if wants_hidden else None
        weight_grad = self.weights.new_empty(vocabulary, width) if wants_weight else None
        if weight_grad is not None and not rows:
            weight_grad.zero_()
        for start in range(0, rows, self.group):
            members = slice(start, min(start + self.group, rows))
            for first in range(start, members.stop, self.chunk):
                piece = slice(first, min(first + self.chunk, members.stop))
                out = None if grads is None else grads[first - start : piece.stop - start]
                self._losses(piece, logits, guide, out)
            if grads is None:
                continue
            change = grads[: members.stop - start]  # [g, V]
            if hidden_grad is not None:
                product(change, self.head, hidden_grad[members])
            if weight_grad is not None:
                _add_product(weight_grad, change.t(), self.student[members], first=start == 0)
        return hidden_grad, weight_grad

    def _losses(
        self, piece: slice, logits: Tensor, guide: Tensor | None, grad: Tensor | None
    ) -> None:
        count = piece.stop - piece.start
        own = product(self.student[piece], self.head.t(), logits[:count])
        other: Tensor | Samples | None = None
        entropy = None
        if guide is not None:
            head = present(self.teacher_head)
            hidden = self.parts[0][piece].to(head.dtype)
            other = product(hidden, head.t(), guide[:count])
        elif self.parts:
            ids, masses, entropy = (part[piece] for part in self.parts)
            other = Samples(ids, masses)
        weights, found = self.weights[piece], self.divergence[piece]
        self.token_losses(
            own, other, self.targets[piece], weights, self.terms, grad, found, self.ce[piece]
        )
        if entropy is not None:
            found.sub_(entropy * weights, alpha=self.terms.temperature**2)

    def _buffer(self, rows: int, dtype: torch.dtype) -> Tensor:
        """Empty [rows, V] whose rows begin at multiples of 16 bytes, which products need."""
        vocabulary = self.head.shape[0]
        padded = -(-vocabulary // 8) * 8
        return self.head.new_empty(rows, padded, dtype=dtype)[:, :vocabulary]


def product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """a b, accumulated and returned in the type of `out`, which is fp32 for 16-bit operands."""
    if a.dtype == out.dtype:
        return torch.mm(a, b, out=out)
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=out.dtype, out=out)
    return torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)


def _add_product(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """total += a b, or total = a b if it is the first."""
    if first:
        product(a, b, total)
    elif a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        # no product of all torch versions adds 16-bit operands to fp32 in place
        size = -(-len(total) // SLABS)
        for start in range(0, len(total), size):
            slab = total[start : start + size]
            slab += product(a[start : start + size], b, torch.empty_like(slab))
