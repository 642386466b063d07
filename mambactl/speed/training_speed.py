"""Speed of training steps on random tokens, and a check of their gradients.

The same run that is timed must lower its loss, and its kernels must give the gradients of the
reference on a slice of the batch.
"""

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mambactl.data.pack import Batch
from mambactl.errors import CheckError
from mambactl.json_values import JsonObject
from mambactl.kernels.dispatch import SWITCH, triton_missing
from mambactl.speed.memory import peak_bytes, reset_peak

# documents per row, as short chats fill rows of 512 tokens
DOCUMENTS = 4
# tokens of the slice on which gradients are compared
SLICE_ROWS, SLICE_TOKENS = 2, 192
# relative error of all gradients together. Either route rounds to bf16 in other places, and what is
# rounded in one layer grows in the next: through SmolLM2's 30, bf16 products alone move gradients
# by 0.26 from those of fp32. A wrong kernel moves them by their own size.
GRADIENT_ERRORS = {"align": {"float32": 1e-3, "bfloat16": 0.05}}
DEEP_GRADIENT_ERRORS = {"float32": 5e-3, "bfloat16": 0.5}


@dataclass(frozen=True)
class Step:
    """One kind of training step: `backward` adds gradients of `parameters`, `update` uses them."""

    name: str
    count: Callable[[Batch], int]
    backward: Callable[[Batch, int], Tensor]
    update: Callable[[], None]
    parameters: Sequence[nn.Parameter]

    def take(self, batch: Batch, tokens: int) -> Tensor:
        """The whole step; its loss, which is not waited for."""
        loss = self.backward(batch, tokens)
        self.update()
        return loss


def random_batch(vocabulary: int, rows: int, length: int, seed: int) -> Batch:
    """Full rows of random tokens, each of several documents of random lengths, on the host."""
    draw = torch.Generator().manual_seed(seed)
    starts = torch.rand(rows, length, generator=draw) < DOCUMENTS / length
    starts[:, 0] = True
    at = torch.arange(length).expand(rows, length)
    positions = at - at.masked_fill(~starts, 0).cummax(1).values
    return Batch(
        torch.randint(vocabulary, (rows, length), generator=draw),
        (starts.cumsum(1) - 1).int(),
        positions,
        positions > 0,
        torch.ones(rows, length, dtype=torch.bool),
    )


def training_speed(
    step: Step, batch: Batch, device: torch.device, warmup: int, iters: int
) -> JsonObject:
    """Time `iters` steps over one batch after `warmup` (at least one, which compiles).

    Tokens are all of the batch. Raises CheckError unless the loss stays finite and moves: a few
    steps without a slow start may raise it.
    """
    tokens, shape = step.count(batch), batch.input_ids.shape
    batch = batch.to(device)
    reset_peak(device)
    started = time.perf_counter()
    losses = [step.take(batch, tokens) for _ in range(max(1, warmup))]
    _wait(device)
    began = time.perf_counter()
    losses += [step.take(batch, tokens) for _ in range(iters)]
    _wait(device)
    seconds = (time.perf_counter() - began) / iters
    values = [float(loss) for loss in losses]
    if not all(map(math.isfinite, values)) or values[-1] == values[0]:
        raise CheckError(f"the loss of {step.name} went from {values[0]:.4f} to {values[-1]:.4f}")
    return {
        "stage": step.name,
        "batch_size": shape[0],
        "input_len": shape[1],
        "tokens_per_second": shape.numel() / seconds,
        "milliseconds": seconds * 1e3,
        "peak_bytes": peak_bytes(device),
        "starting_seconds": began - started,
        "first_loss": values[0],
        "last_loss": values[-1],
    }


def gradient_error(step: Step, batch: Batch, device: torch.device) -> float | None:
    """Norm of (gradients - the reference's) over the norm of the reference's, on a slice.

    None where the reference is all there is. Run it before blocks are compiled: what is compiled
    keeps the kernels it was made with.
    """
    if triton_missing(device) is not None:
        return None
    part = batch.each(lambda t: t[:SLICE_ROWS, :SLICE_TOKENS].contiguous())
    tokens, part = step.count(part), part.to(device)
    ours = _gradients(step, part, tokens)
    with _reference_only():
        theirs = _gradients(step, part, tokens)
    pairs = zip(ours, theirs, strict=True)
    error = torch.stack([(a - b).double().square().sum() for a, b in pairs]).sum()
    size = torch.stack([b.double().square().sum() for b in theirs]).sum()
    return float((error / size).sqrt())


def require_gradients(name: str, dtype: torch.dtype, error: float | None) -> None:
    """Raise CheckError where gradients are further from the reference than rounding takes them."""
    kind = str(dtype).removeprefix("torch.")
    bound = GRADIENT_ERRORS.get(name, DEEP_GRADIENT_ERRORS)[kind]
    # written so that a NaN fails
    if error is not None and not error <= bound:
        raise CheckError(
            f"gradients of {name} are {error:.2%} off the reference in {kind}, {bound:.2%} allowed"
        )


def _gradients(step: Step, batch: Batch, tokens: int) -> list[Tensor]:
    step.backward(batch, tokens)
    found = []
    for parameter in step.parameters:
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        found.append(grad.detach().clone())
        parameter.grad = None
    return found


@contextmanager
def _reference_only() -> Iterator[None]:
    before = os.environ.get(SWITCH)
    os.environ[SWITCH] = "reference"
    try:
        yield
    finally:
        if before is None:
            del os.environ[SWITCH]
        else:
            os.environ[SWITCH] = before


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
