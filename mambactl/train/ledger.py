"""What a run did: one line of metrics.jsonl per step, read from the device when it is long done.

A step's loss and gradient norm are copied to page-locked memory behind the work that makes them;
the host waits for that copy only `LAG` steps later, so it never stands between two steps of a GPU.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor

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


@dataclass
class PhaseReport:
    """How a phase went; tokens are those the loss counted, `flops` those of the model.

    `starting_seconds`, the first step of every process, holds what compilation took.
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


@dataclass(frozen=True)
class Evaluation:
    """What is measured on held-out text, every so many steps and after each phase."""

    every: int
    measure: Callable[[], dict[str, Any]]


@dataclass
class LossWatch:
    """Whether the smoothed loss of a phase stays far above the best it had after warm-up."""

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
        """Whether what is reached now should not replace an earlier state."""
        return self.above > 0

    @property
    def diverged(self) -> bool:
        """Whether there is no point in going on."""
        return self.above >= PATIENCE


@dataclass
class Progress:
    """Where the run is: `step` optimiser steps of phase number `phase` are done."""

    phase: int = 0
    step: int = 0
    lines: int = 0
    reports: list[PhaseReport] = field(default_factory=list)
    watch: LossWatch = field(default_factory=LossWatch)

    @property
    def total(self) -> int:
        """Optimiser steps of all phases."""
        return sum(report.steps for report in self.reports)

    def sums(self) -> dict[str, Any]:
        """Tokens, seconds and FLOPs since the run began."""
        found: dict[str, Any] = {
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
        """What happened since the last lap does not count."""
        self._mark = time.perf_counter()


def peak_of(device: torch.device) -> int | None:
    """The most bytes a GPU had allocated since `restart_peak`; None elsewhere."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def restart_peak(device: torch.device) -> None:
    """Forget what was allocated before, by a probe or another phase."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
