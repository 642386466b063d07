"""Record of a run: one line of metrics.jsonl per step, read from the device steps later.

A step's loss and gradient norm are copied to page-locked memory behind the work that makes them;
the host waits for that copy only `LAG` steps later, so it never stands between two steps of a GPU.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor

from mambactl.json_values import AnyObject, JsonObject
from mambactl.models.config import HybridConfig
from mambactl.models.mixers.spec import MixerCost

# (what: a mixer or head; how: see `Work.pieces`) -> operations
Pieces = Mapping[tuple[str, str], float]


def mixer_cost(config: HybridConfig, index: int, length: int) -> MixerCost:
    """Operations of the mixer of one layer on rows of `length` tokens."""
    layer = config.layer(index)
    return layer.spec.cost(config, layer.settings, length)


def mlp_cost(config: HybridConfig) -> float:
    """Operations of one MLP per token."""
    return 6.0 * config.hidden_size * config.intermediate_size if config.has_mlp else 0.0


def head_cost(config: HybridConfig) -> float:
    """Operations of the language-model head per token."""
    return 2.0 * config.hidden_size * config.vocab_size


def forward_flops(config: HybridConfig, length: int, head: bool = True) -> float:
    """Operations per token of a forward pass over rows of `length` tokens."""
    layers = range(len(config.mixers))
    mixers = sum(mixer_cost(config, index, length).forward for index in layers)
    return mixers + len(config.mixers) * mlp_cost(config) + (head_cost(config) if head else 0.0)


@dataclass(frozen=True)
class Work:
    """Work of one step of a phase.

    `student.mixers` are those that run, stand-ins included; `layers` those whose mixer trains;
    `rest` says that everything else trains too, with `freeze_kept` but for queries and keys of kept
    heads; `aligns` that layers are trained one by one on the teacher's states, with no pass through
    the student.
    """

    student: HybridConfig
    teacher: HybridConfig | None
    layers: tuple[int, ...]
    rest: bool = False
    aligns: bool = False
    checkpointing: bool = False
    freeze_kept: bool = True

    def flops(self, rows: int, length: int) -> float:
        """Operations of a batch; those that checkpointing repeats do not count."""
        return (
            rows
            * length
            * sum(count for (_, how), count in self.pieces(length).items() if how != "repeat")
        )

    def pieces(self, length: int) -> Pieces:
        """Operations per token by what makes them.

        how is `infer` (a block, forward only), `train` (a block, both ways), `align` (a mixer by
        itself, both ways), `repeat` (a block's forward pass done again) or, for the head, `train`.
        """
        found: defaultdict[tuple[str, str], float] = defaultdict(float)
        if self.teacher is not None:
            for index, kind in enumerate(self.teacher.kinds):
                found[kind, "infer"] += self._block(self.teacher, index, length)
        kinds = self.student.kinds
        if self.aligns:
            for index in self.layers:
                found[kinds[index], "align"] += self._aligned(index, length)
            return found
        lowest = 0 if self.rest else min(self.layers)
        for index, kind in enumerate(kinds):
            found[kind, "train"] += self._trained(index, length, index >= lowest)
            if self.checkpointing:
                found[kind, "repeat"] += self._block(self.student, index, length)
        head = head_cost(self.student)
        guide = head_cost(self.teacher) if self.teacher is not None else 0.0
        found["head", "train"] = guide + head * (3 if self.rest else 2)
        return found

    def _block(self, config: HybridConfig, index: int, length: int) -> float:
        return mixer_cost(config, index, length).forward + mlp_cost(config)

    def _aligned(self, index: int, length: int) -> float:
        # what enters a mixer is the teacher's and needs no gradient
        cost = mixer_cost(self.student, index, length)
        return 2 * cost.entrance - self._frozen(cost) + 3 * (cost.weights + cost.mixing)

    def _trained(self, index: int, length: int, reached: bool) -> float:
        cost, mlp = mixer_cost(self.student, index, length), mlp_cost(self.student)
        forward = cost.forward + mlp
        if not reached:
            return forward
        inputs = cost.entrance + cost.weights + mlp + 2 * cost.mixing
        trains = self.rest or index in self.layers
        weights = cost.entrance - self._frozen(cost) + cost.weights if trains else 0.0
        return forward + inputs + weights + (mlp if self.rest else 0.0)

    def _frozen(self, cost: MixerCost) -> float:
        """Operations whose weights have no gradient."""
        return cost.lookup if self.freeze_kept else 0.0


# steps that a GPU may have in flight while the host prepares the next
LAG = 2

# A smoothed loss this far above its best for this long has left what it reached. An aligned model
# that a too high rate destroyed went from 0.85 to 3.6 nats, more than four times its best, and
# stayed there; batches of a healthy run vary by tens of per cent, which a mean over 20 steps keeps
# well below twice. One odd batch cannot do it: its share of the mean falls to 0.05 * 0.95^50, so
# it would have to be 260 times the usual. The margin is for losses that are next to nothing.
SMOOTHING = 0.05
SETTLING = 20
FACTOR, MARGIN = 2.0, 0.05
PATIENCE = 50


@dataclass(frozen=True)
class Written:
    """Counts of what a student wrote: tokens, answers, those that ended by themselves; seconds."""

    tokens: int = 0
    answers: int = 0
    ended: int = 0
    seconds: float = 0.0

    def __add__(self, other: "Written") -> "Written":
        return Written(
            self.tokens + other.tokens,
            self.answers + other.answers,
            self.ended + other.ended,
            self.seconds + other.seconds,
        )

    def line(self) -> dict[str, float]:
        """Fields of a line of metrics.jsonl."""
        return {
            "written_tokens": self.tokens,
            "answers": self.answers,
            "ended": round(self.ended / max(1, self.answers), 4),
            "writing_seconds": round(self.seconds, 4),
        }


@dataclass
class PhaseReport:
    """Report of a phase; tokens are those the loss counted, `flops` those of the model in training.

    `starting_seconds`, the first step of every process, holds what compilation took. Of a phase
    whose student writes there are the tokens, the answers, and the share of those that `ended`.
    """

    name: str
    steps: int = 0
    first_loss: float | None = None
    last_loss: float | None = None
    tokens: int = 0
    seconds: float = 0.0
    starting_seconds: float = 0.0
    flops: float | None = None
    peak_bytes: int | None = None
    kl: float | None = None
    agreement: float | None = None
    perplexity_ratio: float | None = None
    ce: float | None = None
    recall_kept: float | None = None
    written_tokens: int | None = None
    answers: int | None = None
    ended: float | None = None

    def add(self, written: Written) -> None:
        """Count what the student wrote in a step."""
        answers = self.answers or 0
        ended = round((self.ended or 0.0) * answers) + written.ended
        self.written_tokens = (self.written_tokens or 0) + written.tokens
        self.answers = answers + written.answers
        self.ended = ended / max(1, self.answers)


@dataclass(frozen=True)
class Evaluation:
    """Measurement of held-out text and probes every `every` steps and after each phase."""

    every: int
    measure: Callable[[], JsonObject]


def shown(measured: AnyObject) -> str:
    """The measurements that a progress line has room for."""
    names = {"kl": "KL", "recall_kept": "recall", "tokens_per_step": "tokens/step"}
    return "".join(f", {names[k]} {measured[k]:.4f}" for k in names if k in measured)


@dataclass
class LossWatch:
    """Watch for a smoothed loss that stays far above its best after warm-up, phase by phase."""

    seen: int = 0
    smoothed: float = 0.0
    best: float | None = None
    best_step: int = 0
    above: int = 0

    def see(self, step: int, loss: float) -> None:
        """Take the loss of one more step."""
        self.seen += 1
        weight = max(SMOOTHING, 1 / self.seen)
        self.smoothed += weight * (loss - self.smoothed)
        if self.seen < SETTLING:
            return
        if self.best is None or self.smoothed < self.best:
            self.best, self.best_step = self.smoothed, step
        self.above = self.above + 1 if self.smoothed > FACTOR * self.best + MARGIN else 0

    @property
    def rising(self) -> bool:
        """True if the present state should not replace an earlier one."""
        return self.above > 0

    @property
    def diverged(self) -> bool:
        """True if there is no point in going on."""
        return self.above >= PATIENCE


@dataclass
class Progress:
    """Position of the run: `step` optimiser steps of phase number `phase` are done."""

    phase: int = 0
    step: int = 0
    lines: int = 0
    reports: list[PhaseReport] = field(default_factory=list)
    watch: LossWatch = field(default_factory=LossWatch)

    @property
    def total(self) -> int:
        """Optimiser steps of all phases."""
        return sum(report.steps for report in self.reports)

    def sums(self) -> JsonObject:
        """Tokens, seconds and FLOPs since the run began."""
        found: JsonObject = {
            "tokens": sum(report.tokens for report in self.reports),
            "seconds": round(sum(report.seconds for report in self.reports), 4),
        }
        counted = [report.flops for report in self.reports if report.flops is not None]
        return found | ({"flops": sum(counted)} if counted else {})


@dataclass(frozen=True)
class Pending:
    """A step that the device may still be working on."""

    step: int
    rate: float
    tokens: int
    flops: float | None
    values: Tensor
    copied: torch.cuda.Event | None

    @classmethod
    def of(
        cls, step: int, rate: float, tokens: int, flops: float | None, loss: Tensor, norm: Tensor
    ) -> Self:
        """Send both scalars to the host without waiting for them."""
        values = torch.stack([loss.double(), norm.double()])
        if not values.is_cuda:
            return cls(step, rate, tokens, flops, values, None)
        host = torch.empty(2, dtype=torch.float64, pin_memory=True)
        host.copy_(values, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        return cls(step, rate, tokens, flops, host, copied)

    def read(self) -> tuple[float, float]:
        """Loss and gradient norm, once this step is done; later ones may still be running."""
        if self.copied is not None:
            self.copied.synchronize()
        loss, norm = self.values.tolist()
        return loss, norm


class Clock:
    """Seconds spent on steps, without those for evaluation and saving."""

    def __init__(self) -> None:
        self._mark = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last lap or `restart`."""
        before, self._mark = self._mark, time.perf_counter()
        return self._mark - before

    def restart(self) -> None:
        """Discard the time since the last lap."""
        self._mark = time.perf_counter()


def peak_of(device: torch.device) -> int | None:
    """The most bytes a GPU had allocated since `restart_peak`; None elsewhere."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def restart_peak(device: torch.device) -> None:
    """Reset the peak of allocated memory, of a probe or another phase."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
