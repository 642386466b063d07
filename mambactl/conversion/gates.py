"""Measure the need for each KV head by gates between full attention and a window.

Each KV head has one gate g in [0, 1] in front of the output projection:

    heads = near + g (far - near)

with `far` the teacher's attention and `near` what the head computes when it sees a window alone.
The gates alone are trained, all at once and so with what heads do for each other, to keep the
teacher's predictions on text while a growing penalty on their mean closes them (DuoAttention,
arXiv 2410.10819, trains such gates on passkeys under one penalty). The longer a gate stays open,
the more its head is needed.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mambactl import console
from mambactl.conversion.choice import Unit
from mambactl.conversion.ranking import Instruments, PickedRows
from mambactl.evaluation.controls import Narrowed
from mambactl.json_values import JsonObject
from mambactl.models.mixers.attention import AttentionMixer
from mambactl.models.mixers.settings import WindowSettings
from mambactl.models.mixers.spec import StepContext
from mambactl.present import of_kind

STEPS = 200
LEARNING_RATE = 0.03
# of the KL in nats per token, against the penalty
TEXT_WEIGHT = 4.0
# penalty on the mean gate in the first step and in the last
PENALTIES = (0.05, 20.0)


@dataclass(frozen=True)
class _Gate:
    """The gates of one attention; hooks on it and on its output projection."""

    mixer: AttentionMixer
    narrowed: Narrowed
    gates: Tensor  # [Hk]

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Mix near and far heads while the block lasts."""
        seen = []

        def remember(_: nn.Module, arguments: tuple) -> None:
            seen[:] = arguments

        def mix(projection: nn.Module, arguments: tuple[Tensor]) -> tuple[Tensor]:
            far = arguments[0]
            hidden, context, *_ = self.narrowed(self.mixer, tuple(seen))
            near = self.mixer.features(of_kind(Tensor, hidden), of_kind(StepContext, context))
            gates = self.gates.repeat_interleave(far.shape[-1] // len(self.gates))
            return (near + gates.to(far) * (far - near),)

        handles = (
            self.mixer.register_forward_pre_hook(remember),
            self.mixer.o_proj.register_forward_pre_hook(mix),
        )
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


class GateTraining:
    """Gates of all KV heads of a teacher, and the rows of text that they are trained on."""

    def __init__(self, instruments: Instruments, window: WindowSettings, seed: int):
        self.instruments, model = instruments, instruments.model
        device = instruments.head.weight.device
        heads = model.config.num_key_value_heads
        self.gates = torch.ones(len(model.layers), heads, device=device, requires_grad=True)
        self.attention = [model.layers[index] for index in model.config.attention_layers]
        self.random = torch.Generator().manual_seed(seed)
        # one object for all layers makes the mask of a forward pass once
        self.narrowed = Narrowed(window.window, window.sinks, range(heads), model.config)

    def worth(self, steps: int, task: console.Task) -> Tensor:
        """The mean of each gate [L, Hk] over the steps."""
        optimiser = torch.optim.Adam([self.gates], lr=LEARNING_RATE, betas=(0.9, 0.95))
        total = torch.zeros_like(self.gates)
        rows, order = self.instruments.rows, []
        first, last = PENALTIES
        for step in range(steps):
            penalty = first * (last / first) ** (step / max(1, steps - 1))
            loss = penalty * self.gates.mean()
            loss.backward()
            order = order or torch.randperm(len(rows), generator=self.random).tolist()
            self._divergence(rows[order.pop()]).backward()
            optimiser.step()
            optimiser.zero_grad()
            with torch.no_grad():
                self.gates.clamp_(0, 1)
                total += self.gates
            task.advance()
        return total / steps

    def _divergence(self, rows: PickedRows) -> Tensor:
        """KL(teacher || gated) in nats per token of text, weighted."""
        head = self.instruments.head
        log_p, log_q = (
            head(each).float().log_softmax(-1) for each in (rows.guide, self._states(rows))
        )  # [n, V]
        return TEXT_WEIGHT * (log_p.exp() * (log_p - log_q)).sum(-1).mean()

    def _states(self, rows: PickedRows) -> Tensor:
        with ExitStack() as stack:
            for block in self.attention:
                gate = _Gate(block.attention, self.narrowed, self.gates[block.index])
                stack.enter_context(gate.installed())
            hidden = rows.hidden
            for block in self.instruments.model.layers:
                hidden = block(hidden, rows.context, None)
        return self.instruments.model.norm(hidden[rows.picked])


def gate_worth(
    instruments: Instruments,
    units: Sequence[Unit],
    window: WindowSettings,
    seed: int,
    task: console.Task,
    steps: int = STEPS,
) -> dict[Unit, float]:
    """Mean opening of each unit's gate over the training, in [0, 1]; one process trains."""

    def train() -> JsonObject:
        return {"worth": GateTraining(instruments, window, seed).worth(steps, task).tolist()}

    found = instruments.dealer.from_main(train)["worth"]
    return {unit: found[unit.layer][unit.heads[0]] for unit in units}
