"""Objectives of a training step, as gradients added to a student: mixer alignment or logits KL."""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from mambactl.data.pack import Batch
from mambactl.kernels.divergence import relative_error
from mambactl.models.block import HybridBlock
from mambactl.models.hybrid import HybridForCausalLM
from mambactl.models.mixers.registry import is_new, looks_up
from mambactl.models.mixers.sizes import FLOAT32_PARAMETERS
from mambactl.models.mixers.spec import AnySpec, Mixer, StepContext
from mambactl.train.compiled import compiled
from mambactl.train.losses import Teacher, distillation_loss
from mambactl.train.sharding import inside


class Inputs(Protocol):
    """Inputs of a pass on the device: a named tuple of tensors, None for those not given.

    It has the fields of `data.pack.Batch` first.
    """

    @property
    def input_ids(self) -> Tensor: ...

    @property
    def seq_idx(self) -> Tensor | None: ...

    @property
    def position_ids(self) -> Tensor: ...

    @property
    def loss_mask(self) -> Tensor: ...

    def __iter__(self) -> Iterator[Tensor | None]: ...


Given = TypeVar("Given", bound=Inputs)


class Objective(Protocol[Given]):
    """A mean over tokens, computed batch by batch."""

    def count(self, batch: Batch) -> int:
        """Tokens of the batch that the mean is over."""
        ...

    def inputs(self, batch: Batch, device: torch.device, /) -> Given:
        """Inputs of `backward` for a batch on the host, copied without waiting."""
        ...

    def backward(self, inputs: Given, tokens: float | Tensor, /) -> Tensor:
        """Add the gradient of the batch's share of a mean over `tokens`; return that share.

        `tokens` may be a scalar on the device, for which nothing waits.
        """
        ...


# the inputs of one objective are of its own kind
AnyObjective: TypeAlias = Objective[Any]


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
        """Copy the batch to the device."""
        return batch.to(device)

    def backward(self, batch: Batch, tokens: float | Tensor) -> Tensor:
        """One teacher and one student pass; see `Objective`."""
        with autocast(batch.input_ids.device, self.amp):
            guide = self._guide(batch)
            loss = inside(self.student, lambda student: self._loss(student, batch, guide))
        share = loss / tokens
        share.backward()
        return share.detach()

    def _loss(self, student: HybridForCausalLM, batch: Batch, guide: Teacher | None) -> Tensor:
        hidden, head = last_hidden(student, batch), student.lm_head.weight
        return distillation_loss(hidden, head, *next_tokens(batch), guide, **self.weights).total

    @torch.no_grad()
    def _guide(self, batch: Batch) -> Teacher | None:
        if self.teacher is None:
            return None
        # a head that was split stays whole behind the pass: nothing frees it without a backward one
        return inside(
            self.teacher, lambda model: Teacher(last_hidden(model, batch), model.lm_head.weight)
        )


def next_tokens(batch: Inputs) -> tuple[Tensor, Tensor]:
    """Targets of each position [B, T], and the mask of those that are learned [B, T] bool.

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


class AlignmentObjective:
    """Mean over layers of a recurrence's masked squared error over the variance of its target.

    The target is the output of the teacher's attention less that of attention beside the
    recurrence, a window or kept heads. A recurrence that only outputs the mean has a loss of 1,
    however little is missing, so every layer weighs the same. Raises ValueError when the teacher
    has no attention in a replaced layer, or another number of layers or width.
    """

    def __init__(
        self,
        student: HybridForCausalLM,
        teacher: HybridForCausalLM,
        amp: torch.dtype | None = None,
        compile: bool = False,
    ):
        problem = student.config.misfit(teacher.config)
        if problem:
            raise ValueError(problem)
        self.student, self.teacher, self.amp = student, teacher, amp
        self.layers = student.config.replaced_layers
        self.specs = {index: student.config.layer(index).spec for index in self.layers}
        self._error = compiled(mixer_error) if compile else mixer_error

    def count(self, batch: Batch) -> int:
        """Tokens that are not padding."""
        return int(batch.valid.sum())

    def inputs(self, batch: Batch, device: torch.device) -> Batch:
        """Copy the batch to the device."""
        return batch.to(device)

    def backward(self, batch: Batch, tokens: float | Tensor) -> Tensor:
        """One teacher pass as far as the last mixer; gradients are made on the way."""
        with torch.no_grad(), autocast(batch.input_ids.device, self.amp):
            return inside(self.teacher, lambda teacher: self._follow(teacher, batch, tokens))

    def _follow(self, teacher: HybridForCausalLM, batch: Batch, tokens: float | Tensor) -> Tensor:
        model, shares = teacher.model, []
        # where rows are one document each, positions say nothing that a mask would need
        positions = None if batch.seq_idx is None else batch.position_ids
        hidden, context = model.enter(batch.input_ids, positions, batch.seq_idx)
        context = self.student.model.with_windows(context)
        for index, block in enumerate(model.layers[: self.layers[-1] + 1]):
            if index not in self.specs:
                hidden = block(hidden, context, None)
                continue
            hidden, entered, wanted = inside(block, partial(_observed, hidden, context))
            own = self.student.model.layers[index]
            with torch.enable_grad():
                given = self.specs[index], entered, context, wanted, batch.valid
                error = inside(own, partial(self._missed, *given))
                share = error / (tokens * len(self.specs))
            # a backward pass must not run under autocast
            with torch.autocast(hidden.device.type, enabled=False):
                share.backward()
            shares.append(share.detach())
        return torch.stack(shares).sum()

    def _missed(
        self,
        spec: AnySpec,
        entered: Tensor,
        context: StepContext,
        wanted: Tensor,
        valid: Tensor,
        block: HybridBlock,
    ) -> Tensor:
        return self._error(spec, block.replacing, entered, context, wanted, valid)


def _observed(
    hidden: Tensor, context: StepContext, block: HybridBlock
) -> tuple[Tensor, Tensor, Tensor]:
    return block.observe(hidden, context)


def mixer_error(
    spec: AnySpec,
    mixer: Mixer,
    hidden: Tensor,
    context: StepContext,
    wanted: Tensor,
    valid: Tensor,
) -> Tensor:
    """`relative_error` of a recurrence's output for hidden [B, T, D]; the rest does not learn."""
    with torch.no_grad():
        given = spec.given(mixer, hidden, context)
    return relative_error(spec.recurrent(mixer, hidden, context), wanted, valid, given)


BETAS = (0.9, 0.95)
WEIGHT_DECAY = 0.01
FINAL_SHARE = 0.01
# RADLADS (arXiv 2505.03005) lowers its rate after 83 to 87 % of the tokens
DECAY_START = 0.85


def mixer_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters of the mixers that replaced attention, by name.

    Attention in a window beside a mixer is the teacher's, like the rest: the rate of new mixers
    would undo it.
    """
    return {name: p for name, p in model.named_parameters() if is_new(name)}


def rest_parameters(model: nn.Module, freeze_kept: bool = True) -> dict[str, nn.Parameter]:
    """Parameters by name of what else trains, a tied weight once.

    Queries and keys of kept heads may stay the teacher's: what they find would be lost first.
    """
    rest = {name: p for name, p in model.named_parameters() if not is_new(name)}
    return {name: p for name, p in rest.items() if not (freeze_kept and looks_up(name))}


def build_optimizer(
    parts: Iterable[tuple[dict[str, nn.Parameter], float]],
) -> torch.optim.AdamW:
    """AdamW over (parameters, learning rate) parts; vectors, A_log, D and dt_bias never decay."""
    groups = []
    for parameters, rate in parts:
        for decay in (WEIGHT_DECAY, 0.0):
            members = [p for name, p in parameters.items() if _decays(name, p) == (decay > 0)]
            if members:
                groups.append({"params": members, "lr": rate, "peak": rate, "weight_decay": decay})
    # besides being one pass, the fused form skips a step whose `found_inf` is 1 without being asked
    return torch.optim.AdamW(groups, betas=BETAS, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, share: float) -> None:
    """Give every group its share of its own peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * share


def warmup_of(warmup: int, steps: int) -> int:
    """Steps of warm-up that a phase really has: at most half of its own."""
    return min(warmup, steps // 2)


def schedule(step: int, steps: int, warmup: int, kind: str = "cosine") -> float:
    """Share of the peak rate at `step` (from 0): linear warm-up, then down to FINAL_SHARE.

    `cosine` falls all the way; `wsd` holds the peak until DECAY_START of the steps and falls then.
    """
    warmup = warmup_of(warmup, steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    start = max(warmup, int(DECAY_START * steps)) if kind == "wsd" else warmup
    done = max(0.0, (step - start) / max(1, steps - start))
    return FINAL_SHARE + (1 - FINAL_SHARE) * 0.5 * (1 + math.cos(math.pi * done))


def _decays(name: str, parameter: nn.Parameter) -> bool:
    return parameter.ndim > 1 and name.rsplit(".", 1)[-1] not in FLOAT32_PARAMETERS
