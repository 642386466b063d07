"""The one hand-written loop: phases of optimiser steps that continue exactly after a kill."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field

import torch
from torch import nn

from mambactl import console
from mambactl.data.pack import Batch, Row, batches
from mambactl.errors import CheckError, ResourceError
from mambactl.recipe import TrainConfig
from mambactl.train.interrupt import StopRequest
from mambactl.train.objectives import Objective
from mambactl.train.optimizer import build_optimizer, schedule, set_learning_rate
from mambactl.train.run_folder import RunFolder

Parameters = dict[str, nn.Parameter]


@dataclass(frozen=True)
class Phase:
    """Steps with one objective; only parameters in `parts`, each with its peak rate, train."""

    name: str
    steps: int
    objective: Objective
    parts: Sequence[tuple[Parameters, float]]

    @property
    def parameters(self) -> Parameters:
        """Everything that trains, by name."""
        return {name: p for members, _ in self.parts for name, p in members.items()}


@dataclass
class PhaseReport:
    """How a phase went; tokens are those the loss counted."""

    name: str
    steps: int = 0
    first_loss: float | None = None
    last_loss: float | None = None
    tokens: int = 0
    seconds: float = 0.0


@dataclass
class _Progress:
    """Where the run is: `step` optimiser steps of phase number `phase` are done."""

    phase: int = 0
    step: int = 0
    reports: list[PhaseReport] = field(default_factory=list)

    @property
    def total(self) -> int:
        return sum(report.steps for report in self.reports)


def train(
    model: nn.Module,
    phases: Sequence[Phase],
    rows: Sequence[Row],
    config: TrainConfig,
    folder: RunFolder,
) -> list[PhaseReport]:
    """Run every phase, from the folder's state if it has one.

    State is saved every `save_every` steps, after each phase, and when SIGINT or SIGTERM asks to
    stop. Raises CheckError when a loss or gradient is not finite, ResourceError out of memory.
    """
    torch.manual_seed(config.seed)
    state = folder.load_state()
    progress = _restore(model, state) if state else _Progress()
    folder.truncate_log(progress.total)
    optimizer_state = state["optimizer"] if state else None
    # the saved weights are in the model now; a second copy must not stay
    del state
    model.train()
    with StopRequest() as stop:
        for number in range(progress.phase, len(phases)):
            run = _PhaseRun(model, phases, number, rows, config, folder, progress)
            run.follow(optimizer_state, stop)
            optimizer_state = None
        # asked for while the last state was saved
        stop.deliver()
    model.requires_grad_(False).eval()
    return progress.reports


class _PhaseRun:
    """One phase on its way: optimiser, batches and what to save."""

    def __init__(
        self,
        model: nn.Module,
        phases: Sequence[Phase],
        number: int,
        rows: Sequence[Row],
        config: TrainConfig,
        folder: RunFolder,
        progress: _Progress,
    ):
        self.model, self.config, self.folder, self.progress = model, config, folder, progress
        self.phase = phases[number]
        # a later phase resumes with what earlier ones trained
        self.changed = {k: p for phase in phases[: number + 1] for k, p in phase.parameters.items()}
        self.parameters = list(self.phase.parameters.values())
        model.requires_grad_(False)
        for parameter in self.parameters:
            parameter.requires_grad_(True)
        self.optimizer = build_optimizer(self.phase.parts)
        self.device = self.parameters[0].device
        if len(progress.reports) <= number:
            progress.reports.append(PhaseReport(self.phase.name))
        self.report = progress.reports[number]
        done = progress.total * config.grad_accum
        self.feed = batches(rows, config.batch_size, config.seed, start=done)

    def follow(self, optimizer_state: dict | None, stop: StopRequest) -> None:
        """Take the remaining steps of the phase."""
        if optimizer_state is not None:
            self.optimizer.load_state_dict(optimizer_state)
        with console.progress(self.phase.name, self.phase.steps) as bar:
            bar.advance(self.progress.step)
            for step in range(self.progress.step, self.phase.steps):
                loss = self._timed_step(step)
                rate = self.report.tokens / max(self.report.seconds, 1e-9)
                bar.advance(1, f"loss {loss:.4f}, {rate:,.0f} tokens/s")
                self.progress.step = step + 1
                if stop.signum is not None or (step + 1) % self.config.save_every == 0:
                    self._save(self.optimizer.state_dict())
                if stop.signum is not None:
                    stop.deliver()
        self.progress.phase += 1
        self.progress.step = 0
        self._save(None)

    def _timed_step(self, step: int) -> float:
        started = time.perf_counter()
        try:
            loss, norm, tokens = self._step(step)
        except torch.OutOfMemoryError as error:
            raise ResourceError(
                f"out of memory at step {step + 1} of {self.phase.name}: {error}",
                "halve --batch-size and double --grad-accum, or set --grad-checkpointing",
            ) from error
        report = self.report
        report.seconds += time.perf_counter() - started
        report.steps, report.tokens, report.last_loss = step + 1, report.tokens + tokens, loss
        if report.first_loss is None:
            report.first_loss = loss
        self.folder.log(
            {
                "phase": self.phase.name,
                "step": step + 1,
                "loss": loss,
                "gradient_norm": norm,
                "lr": self.optimizer.param_groups[0]["lr"],
                "tokens": report.tokens,
            }
        )
        return loss

    def _step(self, step: int) -> tuple[float, float, int]:
        set_learning_rate(self.optimizer, schedule(step, self.phase.steps, self.config.warmup))
        self.optimizer.zero_grad(set_to_none=True)
        loss, tokens = _gradients(self.phase, self.feed, self.config.grad_accum, self.device)
        norm = nn.utils.clip_grad_norm_(self.parameters, self.config.grad_clip)
        found, size = float(loss), float(norm)
        if not (torch.isfinite(loss) and torch.isfinite(norm)):
            raise CheckError(
                f"the loss became {found} (gradient norm {size}) at step {step + 1} of "
                f"{self.phase.name}",
                "lower the learning rate or raise --warmup, and start again with --force",
            )
        self.optimizer.step()
        return found, size, tokens

    def _save(self, optimizer_state: dict | None) -> None:
        self.folder.save_state(
            {
                "phase": self.progress.phase,
                "step": self.progress.step,
                "reports": [asdict(report) for report in self.progress.reports],
                "parameters": {name: p.detach() for name, p in self.changed.items()},
                "optimizer": optimizer_state,
                "rng": torch.get_rng_state(),
                "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            }
        )


def _gradients(
    phase: Phase, feed: Iterator[Batch], accum: int, device: torch.device
) -> tuple[torch.Tensor, int]:
    """Gradients of the mean over all tokens of `accum` batches; its value and the tokens."""
    members = [next(feed) for _ in range(accum)]
    # a batch may hold no target at all; the mean is over the step, so that only it must hold one
    tokens = sum(phase.objective.count(batch) for batch in members)
    shares = [phase.objective.backward(batch.to(device), max(1, tokens)) for batch in members]
    return torch.stack(shares).sum(), tokens


def _restore(model: nn.Module, state: dict) -> _Progress:
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in state["parameters"].items():
            parameters[name].copy_(value)
    torch.set_rng_state(state["rng"])
    if state["cuda_rng"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda_rng"])
    reports = [PhaseReport(**report) for report in state["reports"]]
    return _Progress(state["phase"], state["step"], reports)
