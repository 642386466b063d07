"""What a training step minimises, as gradients added to a student: mixer alignment or logits KL."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from mambactl.data.pack import Batch
from mambactl.models.hybrid import HybridForCausalLM
from mambactl.train.losses import Teacher, distillation_loss


class Inputs(Protocol):
    """Everything a pass reads, on the device: a named tuple of tensors, None for what is not given.

    It has the fields of `data.pack.Batch` first.
    """

    input_ids: Tensor
    seq_idx: Tensor | None
    position_ids: Tensor
    loss_mask: Tensor

    def __iter__(self) -> Iterator[Tensor | None]: ...


class Objective(Protocol):
    """A mean over tokens, computed batch by batch."""

    def count(self, batch: Batch) -> int:
        """Tokens of the batch that the mean is over."""
        ...

    def inputs(self, batch: Batch, device: torch.device) -> Inputs:
        """What `backward` reads for a batch on the host, copied without waiting."""
        ...

    def backward(self, inputs: Inputs, tokens: int | Tensor) -> Tensor:
        """Add the gradient of the batch's share of a mean over `tokens`; return that share.

        `tokens` may be a scalar on the device, for which nothing waits.
        """
        ...


class LogitsObjective:
    """kl_weight * divergence(teacher, student) + ce_weight * CE per predicted token.

    Without a teacher the CE alone. The divergence is the forward KL, the reverse KL or a
    generalised JSD with `beta`; see `losses.distillation_loss`.
    """

    def __init__(
        self,
        student: HybridForCausalLM,
        teacher: HybridForCausalLM | None,
        kl_weight: float = 1.0,
        ce_weight: float = 0.0,
        temperature: float = 1.0,
        amp: torch.dtype | None = None,
        divergence: str = "forward",
        beta: float = 0.5,
    ):
        self.student, self.teacher, self.amp = student, teacher, amp
        self.weights = {
            "kl_weight": kl_weight,
            "ce_weight": ce_weight,
            "temperature": temperature,
            "divergence": divergence,
            "beta": beta,
        }

    def count(self, batch: Batch) -> int:
        """Tokens that some position of the row predicts."""
        return int(batch.loss_mask[:, 1:].sum())

    def inputs(self, batch: Batch, device: torch.device) -> Batch:
        """The batch."""
        return batch.to(device)

    def backward(self, batch: Batch, tokens: int | Tensor) -> Tensor:
        """One teacher and one student pass; see `Objective`."""
        with autocast(batch.input_ids.device, self.amp):
            guide = self._guide(batch)
            loss = distillation_loss(
                last_hidden(self.student, batch),
                self.student.lm_head.weight,
                *next_tokens(batch),
                guide,
                **self.weights,
            ).total
        share = loss / tokens
        share.backward()
        return share.detach()

    @torch.no_grad()
    def _guide(self, batch: Batch) -> Teacher | None:
        if self.teacher is None:
            return None
        return Teacher(last_hidden(self.teacher, batch), self.teacher.lm_head.weight)


def next_tokens(batch: Inputs) -> tuple[Tensor, Tensor]:
    """What each position predicts [B, T], and whether that is learned [B, T] bool.

    No row learns its first token, so its last position, which sees that one here, is masked.
    States need no slice, whose copy and gradient would be as large as they are.
    """
    return batch.input_ids.roll(-1, 1), batch.loss_mask.roll(-1, 1)


def last_hidden(model: HybridForCausalLM, batch: Inputs) -> Tensor:
    """States after the final norm [B, T, D], every document of a row on its own."""
    return model.model(
        batch.input_ids,
        # where rows are one document each, looking for others would wait for the device
        position_ids=None if batch.seq_idx is None else batch.position_ids,
        seq_idx=batch.seq_idx,
        use_cache=False,
    ).last_hidden_state


@contextmanager
def autocast(device: torch.device, dtype: torch.dtype | None) -> Iterator[None]:
    """Mixed precision in `dtype`, or none at all."""
    with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
        yield
