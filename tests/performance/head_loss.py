"""A distillation loss through the language-model head: time, memory and distance from fp64.

The inputs are those of training: the student's states and head in fp32 under autocast, the
teacher's in the type under test. All hold numbers of that type, so that the error is the loss's
own. The teacher is near the student (about 0.05 nats), where a gradient is a small difference.
"""

import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mambactl.speed.memory import peak_bytes, reset_peak
from tests.performance.graphs import Timer

# loss(hidden [N, D], weight [V, D], targets [N], mask [N], teacher's hidden, teacher's weight)
Loss = Callable[..., Tensor]
Numbers = dict[str, Any]

SPREAD = 3.0  # standard deviation of the logits
NEAR = 0.1  # of the teacher's states from the student's, relative
CHECKED_TOKENS = 256
# two products make logits, two make gradients
PRODUCTS = 4


class Size(NamedTuple):
    """Rows, width and vocabulary of the products."""

    tokens: int
    hidden: int
    vocab: int


class Inputs(NamedTuple):
    """Arguments of a loss; the first two are leaves that want gradients."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    mask: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor

    def first(self, tokens: int) -> "Inputs":
        """The same with fewer rows, and leaves of its own."""
        rows = [self.hidden, self.targets, self.mask, self.teacher_hidden]
        hidden, targets, mask, guide = (part.detach()[:tokens] for part in rows)
        leaves = (hidden.clone().requires_grad_(), self.weight.detach().requires_grad_())
        return Inputs(*leaves, targets, mask, guide, self.teacher_weight)


def draw_inputs(size: Size, device: torch.device, dtype: torch.dtype, seed: int) -> Inputs:
    """Random inputs; see the head of this file."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    def stored(part: Tensor) -> Tensor:
        return part.to(dtype)

    hidden = stored(normal(size.tokens, size.hidden))
    weight = stored(normal(size.vocab, size.hidden) * (SPREAD * size.hidden**-0.5))
    guide = stored(hidden.float() + NEAR * normal(*hidden.shape))
    targets = torch.randint(size.vocab, (size.tokens,), generator=generator, device=device)
    mask = torch.ones(size.tokens, dtype=torch.bool, device=device)
    leaves = (hidden.float().requires_grad_(), weight.float().requires_grad_())
    return Inputs(*leaves, targets, mask, guide, weight)


def head_loss(
    loss: Loss,
    size: Size,
    device: torch.device,
    dtype: torch.dtype,
    warmup: int,
    iters: int,
    seed: int = 0,
) -> Numbers:
    """Forward and backward of `loss` on fresh inputs each time, medians of `iters`.

    `peak_bytes` is the most beyond inputs, weights and their gradients (on a CPU, of the process).
    Errors are those of a loss over the first rows against `oracle`: of its value, and of gradients
    in the 2-norm, all relative.
    """
    peak = _peak(loss, draw_inputs(size, device, dtype, seed), dtype)
    seconds = []
    for number in range(warmup + iters):
        inputs = draw_inputs(size, device, dtype, seed + number)
        seconds.append(_seconds(loss, inputs, dtype))
    spent = statistics.median(seconds[warmup:])
    flops = 2 * PRODUCTS * size.tokens * size.hidden * size.vocab
    return {
        **size._asdict(),
        "milliseconds": spent * 1e3,
        "flops_per_second": flops / spent,
        "peak_bytes": peak,
        **_errors(loss, inputs, dtype),
    }


def oracle(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """KL(teacher || student) over all rows, its gradients [N, D] and [V, D]: dense, in fp64."""
    hidden, weight = (part.detach().double() for part in inputs[:2])
    log_p = (hidden @ weight.t()).log_softmax(-1)  # [N, V]
    log_q = (inputs.teacher_hidden.double() @ inputs.teacher_weight.double().t()).log_softmax(-1)
    q = log_q.exp()
    value = (q * (log_q - log_p)).sum()
    change = log_p.exp_().sub_(q)  # [N, V]
    return value, change @ weight, change.t() @ hidden


def _follow(loss: Loss, inputs: Inputs, dtype: torch.dtype) -> Tensor:
    device = inputs.hidden.device.type
    mixed: AbstractContextManager[Any] = nullcontext()
    if dtype != torch.float32:
        mixed = torch.autocast(device, dtype)
    with mixed:
        value = loss(*inputs)
    (value / len(inputs.targets)).backward()
    return value.detach()


def _errors(loss: Loss, inputs: Inputs, dtype: torch.dtype) -> Numbers:
    few = inputs.first(CHECKED_TOKENS)
    value = _follow(loss, few, dtype)
    exact, *gradients = oracle(few)
    numbers: Numbers = {"error_value": abs(value.item() / exact.item() - 1)}
    leaves = {"hidden": few.hidden, "weight": few.weight}
    for (name, leaf), wanted in zip(leaves.items(), gradients, strict=True):
        found = leaf.grad.double() * len(few.targets)
        numbers[f"error_{name}_gradient"] = ((found - wanted).norm() / wanted.norm()).item()
    return numbers


def _peak(loss: Loss, inputs: Inputs, dtype: torch.dtype) -> int:
    """Bytes beyond inputs, weights and gradients; apart, because it empties caches first."""
    device = inputs.hidden.device
    reset_peak(device)
    before = peak_bytes(device)
    _follow(loss, inputs, dtype)
    return max(0, peak_bytes(device) - before - inputs.hidden.nbytes - inputs.weight.nbytes)


def _seconds(loss: Loss, inputs: Inputs, dtype: torch.dtype) -> float:
    if inputs.hidden.is_cuda:
        timer = Timer()
        timer.run(lambda: _follow(loss, inputs, dtype))
        return timer.seconds()[0]
    started = time.perf_counter()
    _follow(loss, inputs, dtype)
    return time.perf_counter() - started
