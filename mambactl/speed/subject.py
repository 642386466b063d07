"""Subject of a speed measurement: a model, its prompts, its expected answers, and the points."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from mambactl import console
from mambactl.decode.backend import AnyEngine
from mambactl.decode.sampler import SamplingParams
from mambactl.decode.stats import DecodeStats
from mambactl.errors import CheckError
from mambactl.models.hybrid import HybridForCausalLM
from mambactl.options import BenchConfig
from mambactl.speed.limits import Numbers
from mambactl.speed.shapes import cycle_of, first_wrong

Prompts = list[list[int]]


@dataclass(frozen=True)
class Grid:
    """Every pair of context length and batch size, and how often each is measured: with a new
    engine for each of `repeats`, then `iters` times. All rows have one prompt if `same_prompt`.
    """

    input_len: Sequence[int]
    batch_size: Sequence[int]
    output_len: int
    warmup: int = 1
    iters: int = 3
    seed: int = 0
    repeats: int = 1
    same_prompt: bool = False

    @classmethod
    def of(cls, config: BenchConfig) -> "Grid":
        """The points that the options ask for."""
        return cls(
            config.input_len,
            config.batch_size,
            config.output_len,
            config.warmup,
            config.iters,
            config.seed,
            config.repeats,
            config.same_prompt,
        )

    @property
    def points(self) -> list[tuple[int, int]]:
        """Pairs (context length, rows)."""
        return [(length, rows) for length in self.input_len for rows in self.batch_size]

    @property
    def rounds(self) -> int:
        """Rounds at every point, unmeasured ones among them."""
        return self.repeats * (self.warmup + self.iters)

    def mean_context(self, length: int) -> int:
        """Tokens that a decoding step finds behind a prompt of `length`, on average."""
        return length + self.output_len // 2


@dataclass(frozen=True)
class Subject:
    """A model on its device, which reads `bandwidth` bytes/s.

    With `successor` [V] the model is scripted: prompts follow that map and answers have to. They
    begin after whole periods of the cycle. `rounded`: weights may be read in bfloat16 copies.
    """

    model: HybridForCausalLM
    label: str
    bandwidth: float
    successor: Tensor | None = None
    period: int = 1
    rounded: bool = False

    def prompts(self, length: int, rows: int, grid: Grid) -> Prompts:
        """Token ids [rows][length]."""
        if grid.same_prompt and rows > 1:
            return self.prompts(length, 1, grid) * rows
        if self.successor is not None:
            return scripted_prompts(self.successor, rows, length, grid.seed, self.period)
        return random_prompts(self.model.config.vocab_size, rows, length, grid.seed)

    def check(self, prompts: Prompts, answers: Sequence[Sequence[int]]) -> None:
        """Raise CheckError that names the first token that is not the scripted one."""
        if self.successor is None:
            return
        for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            wrong = first_wrong([prompt[-1], *answer], self.successor)
            if wrong is not None:
                raise CheckError(
                    f"{self.label}: token {wrong - 1} of row {row} is {answer[wrong - 1]}, "
                    f"which the script forbids ({len(prompts)} rows behind {len(prompt)} tokens)",
                    "MAMBACTL_KERNELS=reference decodes without the GPU kernels",
                )


def random_prompts(vocab_size: int, rows: int, length: int, seed: int) -> Prompts:
    """Token ids [rows][length], the same for every model with this vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab_size, (rows, length), generator=generator).tolist()


def scripted_prompts(
    successor: Tensor, rows: int, length: int, seed: int, period: int = 1
) -> Prompts:
    """Pieces [rows][length] of the map's cycle, each from another offset of it.

    They end with the first token of a period.
    """
    generator = torch.Generator().manual_seed(seed)
    cycle = cycle_of(successor)  # [n]
    periods = max(len(cycle) // period, 1)
    ends = torch.randint(periods, (rows, 1), generator=generator) * period  # [B, 1]
    at = ends + torch.arange(1 - length, 1)  # [B, T]
    return cycle[at % len(cycle)].tolist()


def sweep(
    label: str,
    grid: Grid,
    columns: Sequence[str],
    measure: Callable[[int, int, Callable[[], None]], Numbers],
) -> list[Numbers]:
    """`measure(length, rows, advance)` at every point, `advance` after each of its rounds.

    A point that does not fit a GPU has None in all `columns`.
    """
    found = []
    total = len(grid.points) * grid.rounds
    with console.progress(label, total) as progress:
        for length, rows in grid.points:
            status = f"{length} tokens x {rows} rows"
            try:
                found.append(measure(length, rows, lambda s=status: progress.advance(status=s)))
            except torch.OutOfMemoryError:
                console.warn(f"{label}: {status} do not fit in memory")
                found.append(dict.fromkeys(columns))
    return found


@dataclass(frozen=True)
class Round:
    """Statistics of one call, and its seconds from the prompts to the first token."""

    stats: DecodeStats
    first_token: float


class _FirstToken:
    """Timer of the first token, from its own construction on."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.seconds = 0.0

    def __call__(self, row: int, tokens: list[int]) -> None:
        self.seconds = self.seconds or time.perf_counter() - self.start


Made = TypeVar("Made", bound=AnyEngine)


def decode(
    engine: AnyEngine, subject: Subject, prompts: Prompts, grid: Grid, advance: Callable[[], None]
) -> list[Round]:
    """Decode the same prompts in every round; returns the measured rounds, all of them checked."""
    params = SamplingParams(max_new_tokens=grid.output_len)
    rounds = []
    for _ in range(grid.warmup + grid.iters):
        clock = _FirstToken()
        output = engine.generate(prompts, params, on_tokens=clock)
        subject.check(prompts, output.tokens)
        rounds.append(Round(output.stats, clock.seconds))
        advance()
    return rounds[grid.warmup :]


def rounds_of(
    make: Callable[[], Made],
    subject: Subject,
    prompts: Prompts,
    grid: Grid,
    advance: Callable[[], None],
) -> tuple[Made, list[Round]]:
    """Make an engine per repetition; return the last one, and the rounds of all."""
    engine, rounds = make(), []
    for number in range(grid.repeats):
        engine = make() if number else engine
        rounds += decode(engine, subject, prompts, grid, advance)
    return engine, rounds


def spread(**rounds: Sequence[float]) -> Numbers:
    """The medians of named numbers over the rounds, and beside them the smallest and the largest
    as their `intervals`.
    """
    medians = {name: statistics.median(values) for name, values in rounds.items()}
    return medians | {
        "intervals": {name: [min(values), max(values)] for name, values in rounds.items()}
    }
