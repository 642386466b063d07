"""The one hand-written loop: phases of optimiser steps that continue exactly after a kill."""

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from mambactl import console
from mambactl.checkpoint.run_folder import RunFolder
from mambactl.data.pack import Batch, Row, ahead, batches
from mambactl.errors import CheckError, ResourceError, UsageError
from mambactl.json_values import JsonObject
from mambactl.options import DistillConfig
from mambactl.present import present
from mambactl.ranks import add_up, from_main, largest, processes, rank, total
from mambactl.train.best_weights import BestWeights
from mambactl.train.captured import CapturedObjective, recorder_for
from mambactl.train.consolidate import gathered, part, scatter_moments, whole
from mambactl.train.drawn_windows import DrawnWindows
from mambactl.train.interrupt import StopRequest
from mambactl.train.ledger import (
    LAG,
    Clock,
    Evaluation,
    LossWatch,
    Pending,
    PhaseReport,
    Progress,
    Written,
    peak_of,
    restart_peak,
    shown,
)
from mambactl.train.optimization import (
    AnyObjective,
    build_optimizer,
    schedule,
    set_learning_rate,
    warmup_of,
)
from mambactl.train.sharding import regather

Parameters = dict[str, nn.Parameter]
# measurements that a report keeps
MEASURED = ("kl", "agreement", "perplexity_ratio", "recall_kept")
# steps of a phase without a token to learn after which none is expected
UNLEARNED_STEPS = 10


class Feed(Protocol):
    """Source of batches that a phase makes with the model in training, each on demand."""

    def open(self, done: int) -> AbstractContextManager[Iterator[Batch]]:
        """Batches of this process from number `done` on, counted from the start of the run."""
        ...

    def take_counts(self) -> Written:
        """Return the counts of written text of the oldest step that is not logged yet."""
        ...


@dataclass(frozen=True)
class Phase:
    """Steps with one objective; only parameters in `parts`, each with its peak rate, train.

    `context` is how the model is while the phase lasts, and `whole` says that it is as it will be
    saved; `windows` draws their size for every step; `flops(rows, length, window)` counts a batch;
    `cure` is what to change when the loss leaves what it had reached; without a `feed` batches are
    rows of the data.
    """

    name: str
    steps: int
    objective: AnyObjective
    parts: Sequence[tuple[Parameters, float]]
    context: AbstractContextManager[object] = field(default_factory=nullcontext)
    flops: Callable[[int, int, int | None], float] | None = None
    cure: str = "lower --lr"
    whole: bool = True
    windows: DrawnWindows | None = None
    feed: Feed | None = None

    @property
    def parameters(self) -> Parameters:
        """Everything that trains, by name."""
        return {name: p for members, _ in self.parts for name, p in members.items()}


class Trained(NamedTuple):
    """Reports of all phases, and the best measurement, if its weights were kept."""

    reports: list[PhaseReport]
    best: JsonObject | None


def train(
    model: nn.Module,
    phases: Sequence[Phase],
    rows: Sequence[Row],
    config: DistillConfig,
    folder: RunFolder,
    evaluation: Evaluation | None = None,
    trim: bool = True,
) -> Trained:
    """Run every phase, from the folder's state if it has one.

    The model ends with the last weights, or with `keep_best` the best that were measured. State is
    saved every `save_every` steps, after each phase, and when SIGINT or SIGTERM asks to stop.
    Raises CheckError when a loss or gradient is not finite or the loss left what it had reached,
    ResourceError out of memory.
    """
    # the main process is in its folder, whose state is the one to go on from
    from_main(None)
    torch.manual_seed(config.seed)
    state = folder.load_state()
    if from_main(state is None) != (state is None):
        raise ResourceError(
            f"the state in {folder.path} is not seen by every process of the run",
            "give an -o OUT on a file system that all machines share",
        )
    progress = _restore(model, state) if state else Progress()
    folder.truncate_log(progress.lines)
    optimizer_state = state["optimizer"] if state else None
    # the saved weights are in the model now; a second copy must not stay
    del state
    model.train()
    best = None
    if config.keep_best:
        trained = {name: p for phase in phases for name, p in phase.parameters.items()}
        best = BestWeights(folder, trained)
    with StopRequest() as stop:
        for number in range(progress.phase, len(phases)):
            run = _PhaseRun(model, phases, number, config, folder, progress, evaluation, best)
            done = progress.total * config.grad_accum
            own = phases[number].feed
            if own is not None:
                opened = own.open(done)
            else:
                share = rank(), processes()
                source = batches(rows, config.batch_size, config.seed, done, trim, share)
                opened = ahead(source, pin=run.device.type == "cuda")
            with phases[number].context, opened as feed:
                run.follow(feed, optimizer_state, stop)
            optimizer_state = None
        # asked for while the last state was saved
        stop.deliver()
    model.requires_grad_(False).eval()
    return Trained(progress.reports, None if best is None else best.restore())


class _PhaseRun:
    """One phase on its way: optimiser, steps in flight and what to save."""

    def __init__(
        self,
        model: nn.Module,
        phases: Sequence[Phase],
        number: int,
        config: DistillConfig,
        folder: RunFolder,
        progress: Progress,
        evaluation: Evaluation | None,
        best: BestWeights | None = None,
    ):
        self.model, self.config, self.folder, self.progress = model, config, folder, progress
        self.phase, self.evaluation = phases[number], evaluation
        self.best, self.shown = best, ""
        # a later phase resumes with what earlier ones trained
        self.changed = {k: p for phase in phases[: number + 1] for k, p in phase.parameters.items()}
        self.parameters = list(self.phase.parameters.values())
        self.split = isinstance(model, FSDPModule)
        self.device = self.parameters[0].device
        self.optimizer = build_optimizer(self.phase.parts)
        # by size of the windows: each has launches of its own
        self.captured: dict[int | None, CapturedObjective] = {}
        self.recorder = recorder_for(self.device) if config.capture else None
        self.adds = self.recorder is not None and config.grad_accum > 1
        if len(progress.reports) <= number:
            progress.reports.append(PhaseReport(self.phase.name))
            progress.watch = LossWatch()
        self.report = progress.reports[number]
        self.pending: deque[Pending] = deque()
        self.lag = LAG if self.device.type == "cuda" else 0
        restart_peak(self.device)
        self.clock = Clock()
        self.started = False

    def follow(
        self, feed: Iterator[Batch], optimizer_state: dict | None, stop: StopRequest
    ) -> None:
        """Take the remaining steps of the phase."""
        for parameter in self.model.requires_grad_(False).parameters():
            # of a phase before
            parameter.grad = None
        for parameter in self.parameters:
            parameter.requires_grad_(True)
        if optimizer_state is not None:
            self.optimizer.load_state_dict(scatter_moments(self.optimizer, optimizer_state))
        if self.progress.lines == 0 and self.evaluation is not None:
            self._log({"phase": self.phase.name, "step": 0, **self.progress.sums()}, evaluates=True)
        try:
            self._steps(feed, stop)
        finally:
            # the next phase has its own, and needs the memory
            for captured in self.captured.values():
                captured.release()
        self.progress.phase += 1
        self.progress.step = 0
        self._save(None)
        stop.unsaved = False

    def _steps(self, feed: Iterator[Batch], stop: StopRequest) -> None:
        with console.progress(self.phase.name, self.phase.steps) as bar:
            bar.advance(self.progress.step)
            self.clock.restart()
            for step in range(self.progress.step, self.phase.steps):
                self.pending.append(self._launch(step, feed))
                stop.unsaved = True
                self.progress.step = step + 1
                # a signal may reach the processes in different steps, but all save in the same
                signum = largest(stop.signum or 0)
                saves = signum > 0 or (step + 1) % self.config.save_every == 0
                self._settle(0 if saves or self._evaluates(step + 1) else self.lag, bar)
                # a loss on its way up must not take the place of what was good
                if saves and (signum or not self.progress.watch.rising):
                    self._save(self.optimizer.state_dict())
                    stop.unsaved = False
                if signum:
                    stop.signum = signum
                    stop.deliver()
            self._settle(0, bar)

    def _evaluates(self, step: int) -> bool:
        """True if held-out text is measured after this step."""
        if self.evaluation is None:
            return False
        return step == self.phase.steps or step % self.evaluation.every == 0

    def _launch(self, step: int, feed: Iterator[Batch]) -> Pending:
        """Give the device one step to do; nothing here waits for it."""
        share = schedule(step, self.phase.steps, self.config.warmup, self.config.schedule)
        set_learning_rate(self.optimizer, share)
        # a recording that adds does so to the gradients that were there when it was made
        self.optimizer.zero_grad(set_to_none=not self.adds)
        members = [next(feed) for _ in range(self.config.grad_accum)]
        windows, size = self.phase.windows, None
        if windows is not None:
            size = windows.draw(self.phase.name, step)
        try:
            with nullcontext() if size is None else present(windows).of(size):
                objective = self._objective(size)
                loss, tokens = _gradients(objective, members, self.device, self.split)
            # those of weights that are split are added up on their way back
            own = [] if self.split else [p.grad for p in self.parameters if p.grad is not None]
            add_up([loss, *own])
            norm = whole(nn.utils.clip_grad_norm_(self.parameters, self.config.grad_clip))
            # fused AdamW looks at this on the device, and changes nothing where it is 1
            unusable = (~(loss.isfinite() & norm.isfinite())).float()
            self.optimizer.found_inf = unusable  # pyright: ignore[reportAttributeAccessIssue]
            self.optimizer.step()
        except torch.OutOfMemoryError as error:
            raise ResourceError(
                f"out of memory at step {step + 1} of {self.phase.name}: {error}",
                "halve --batch-size and double --grad-accum, or set --grad-checkpointing",
            ) from error
        flops = None
        if self.phase.flops is not None:
            shapes = (batch.input_ids.shape for batch in members)
            flops = sum(self.phase.flops(rows, length, size) for rows, length in shapes)
        rate = self.optimizer.param_groups[0]["lr"]
        return Pending.of(step + 1, rate, tokens, flops, loss, norm)

    def _objective(self, size: int | None) -> AnyObjective:
        """Objective of a step with windows of this size, recorded if steps are replayed."""
        if self.recorder is None:
            return self.phase.objective
        if size not in self.captured:
            self.captured[size] = CapturedObjective(
                self.phase.objective, self.parameters, self.recorder, self.adds
            )
        return self.captured[size]

    def _settle(self, keep: int, bar: console.Task) -> None:
        """Read steps until at most `keep` are in flight; log, check and evaluate each."""
        while len(self.pending) > keep:
            pending = self.pending.popleft()
            loss, norm = pending.read()
            self._require_finite(pending.step, loss, norm)
            line = self._account(pending, loss, norm)
            self._require_learned(pending.step)
            self._log(line, self._evaluates(pending.step))
            rate = f"{line['tokens_per_second']:,.0f} tokens/s"
            bar.advance(1, f"loss {loss:.4f}{self.shown}, {rate}")
            if pending.step > warmup_of(self.config.warmup, self.phase.steps):
                self.progress.watch.see(pending.step, loss)
                self._require_progress(pending.step)

    def _account(self, pending: Pending, loss: float, norm: float) -> JsonObject:
        report, seconds = self.report, self.clock.lap()
        if report.steps == 0:
            report.first_loss = loss
        if not self.started:
            self.started = True
            report.starting_seconds += seconds
        report.steps, report.last_loss = pending.step, loss
        report.tokens += pending.tokens
        report.seconds += seconds
        if pending.flops is not None:
            report.flops = (report.flops or 0.0) + pending.flops
        line = {
            "phase": self.phase.name,
            "step": pending.step,
            "loss": loss,
            "gradient_norm": norm,
            "lr": pending.rate,
            **self.progress.sums(),
            "tokens_per_second": round(pending.tokens / max(seconds, 1e-9), 1),
        }
        if self.phase.feed is not None:
            written = self.phase.feed.take_counts()
            report.add(written)
            line |= written.line()
        if (peak := peak_of(self.device)) is not None:
            report.peak_bytes = line["peak_bytes"] = peak
        return line

    def _log(self, line: JsonObject, evaluates: bool) -> None:
        if evaluates:
            self.model.eval()
            found = present(self.evaluation).measure()
            regather(self.model)
            self.model.train()
            if self.best is not None and self.phase.whole:
                found["score"] = self.best.offer(self.phase.name, line["step"], found)
            line, self.shown = line | found, shown(found)
            for name in MEASURED:
                setattr(self.report, name, found.get(name))
            self.clock.restart()
        self.folder.log(line)
        self.progress.lines += 1

    def _require_finite(self, step: int, loss: float, norm: float) -> None:
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise CheckError(
                f"the loss became {loss} (gradient norm {norm}) at step {step} of "
                f"{self.phase.name}",
                f"{self.phase.cure} or raise --warmup, and start again with --force",
            )

    def _require_learned(self, step: int) -> None:
        if self.report.tokens == 0 and step >= min(UNLEARNED_STEPS, self.phase.steps):
            raise UsageError(
                f"{step} {'steps' if step > 1 else 'step'} of {self.phase.name} held no token to "
                "learn: labels are masked, or rows hold one token each",
                "give other data (to draft also a larger --vocabulary)",
            )

    def _require_progress(self, step: int) -> None:
        watch = self.progress.watch
        if watch.diverged:
            kept = self.folder.resumable
            raise CheckError(
                f"the smoothed loss of {self.phase.name} rose from {watch.best:.4f} at step "
                f"{watch.best_step} to {watch.smoothed:.4f} at step {step} and stays there"
                + (f"; the last good state is kept in {self.folder.path}" if kept else ""),
                f"{self.phase.cure} or raise --warmup, and start again with --force",
            )

    def _save(self, optimizer_state: dict | None) -> None:
        progress = self.progress
        state: JsonObject = {
            "phase": progress.phase,
            "step": progress.step,
            "lines": progress.lines,
            "reports": [asdict(report) for report in progress.reports],
            "watch": asdict(progress.watch),
            "parameters": {name: p.detach() for name, p in self.changed.items()},
            "optimizer": optimizer_state,
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }
        # whole, so that any number of processes can go on from it
        self.folder.save_state(gathered(state))
        self.clock.restart()


def _gradients(
    objective: AnyObjective, members: Sequence[Batch], device: torch.device, split: bool
) -> tuple[torch.Tensor, int]:
    """This process's share of a mean over all tokens of all processes' batches; those tokens.

    Gradients are of the share, too; those of weights that are `split`, of the whole.
    """
    # a batch may hold no target at all; the mean is over the step, so that only it must hold one.
    # counted before the copy: on the device it would have to be waited for
    counted = sum(objective.count(batch) for batch in members)
    tokens = int(total(torch.tensor(counted)))
    # FSDP takes the mean over processes, where the sum is meant
    averaged = processes() if split else 1
    divisor = max(1, tokens) / averaged
    shares = [objective.backward(objective.inputs(batch, device), divisor) for batch in members]
    return torch.stack(shares).sum() / averaged, tokens


def _restore(model: nn.Module, state: dict) -> Progress:
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in state["parameters"].items():
            parameters[name].copy_(part(value, parameters[name]))
    torch.set_rng_state(state["rng"])
    if state["cuda_rng"] and torch.cuda.is_available():
        # it may have been saved beside more GPUs
        torch.cuda.set_rng_state_all(state["cuda_rng"][: torch.cuda.device_count()])
    reports = [PhaseReport(**report) for report in state["reports"]]
    watch = LossWatch(**state["watch"])
    return Progress(state["phase"], state["step"], state["lines"], reports, watch)
