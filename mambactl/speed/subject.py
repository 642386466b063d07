"""What is measured and over which points: a model, its prompts, and what its answers have to be."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mambactl import console
from mambactl.decode.engine import Generation
from mambactl.decode.sampler import SamplingParams
from mambactl.decode.stats import DecodeStats
from mambactl.errors import CheckError
from mambactl.models.hybrid import HybridForCausalLM
from mambactl.options import BenchConfig
from mambactl.speed.synthetic import first_wrong

Prompts = list[list[int]]
Numbers = dict[str, Any]


@dataclass(frozen=True)
class Grid:
    """Every pair of context length and batch size, and how often each is measured."""

    input_len: Sequence[int]
    batch_size: Sequence[int]
    output_len: int
    warmup: int = 1
    iters: int = 3
    seed: int = 0

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
        )

    @property
    def points(self) -> list[tuple[int, int]]:
        """Pairs (context length, rows)."""
        return [(length, rows) for length in self.input_len for rows in self.batch_size]

    def mean_context(self, length: int) -> int:
        """Tokens that a decoding step finds behind a prompt of `length`, on average."""
        return length + self.output_len // 2


@dataclass(frozen=True)
class Subject:
    """A model on its device, which reads `bandwidth` bytes/s.

    With `successor` [V] the model is scripted: prompts follow that map and answers have to.
    """

    model: HybridForCausalLM
    label: str
    bandwidth: float
    successor: Tensor | None = None

    def prompts(self, length: int, rows: int, seed: int) -> Prompts:
        """Token ids [rows][length]."""
        if self.successor is not None:
            return scripted_prompts(self.successor, rows, length, seed)
        return random_prompts(self.model.config.vocab_size, rows, length, seed)

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


def scripted_prompts(successor: Tensor, rows: int, length: int, seed: int) -> Prompts:
    """Pieces [rows][length] of the map's cycle, each from another offset of it."""
    generator = torch.Generator().manual_seed(seed)
    following = successor.tolist()
    prompts = []
    for start in torch.randint(len(following), (rows,), generator=generator).tolist():
        # any token may lead into the cycle, but none of the cycle out of it
        prompt = [following[start]]
        while len(prompt) < length:
            prompt.append(following[prompt[-1]])
        prompts.append(prompt)
    return prompts


def sweep(
    subject: Subject,
    grid: Grid,
    columns: Sequence[str],
    measure: Callable[[int, int, Callable[[], None]], Numbers],
) -> list[Numbers]:
    """`measure(length, rows, advance)` at every point, `advance` after each of its rounds.

    A point that does not fit a GPU has None in all `columns`.
    """
    found = []
    total = len(grid.points) * (grid.warmup + grid.iters)
    with console.progress(subject.label, total) as progress:
        for length, rows in grid.points:
            status = f"{length} tokens x {rows} rows"
            try:
                found.append(measure(length, rows, lambda s=status: progress.advance(status=s)))
            except torch.OutOfMemoryError:
                console.warn(f"{subject.label}: {status} do not fit in memory")
                found.append(dict.fromkeys(columns))
    return found


def decode(
    engine: Any, subject: Subject, prompts: Prompts, grid: Grid, advance: Callable[[], None]
) -> list[DecodeStats]:
    """Decode the same prompts again and again; the measured rounds, every one of them checked."""
    params = SamplingParams(max_new_tokens=grid.output_len)
    runs = []
    for _ in range(grid.warmup + grid.iters):
        output: Generation = engine.generate(prompts, params)
        subject.check(prompts, output.tokens)
        runs.append(output.stats)
        advance()
    return runs[grid.warmup :]
