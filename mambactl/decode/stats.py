"""Statistics of a decoding run: counts, and the seconds of each phase."""

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch


class Seconds(dict[str, float]):
    """Seconds by phase; 0 for a phase that was not timed."""

    def __missing__(self, phase: str) -> float:
        return 0.0


@dataclass
class DecodeStats:
    """Counts and seconds; a row step is one target pass seen by one sequence.

    `histogram` and `lengths` count row steps by tokens accepted and by tokens drafted. Of
    `tokens`, reading the prompts wrote `at_once`; of `prompt_tokens`, `prompt_shared` were not
    read, as other prompts begin with them or a file of `--prefix-cache` had them: of those,
    `prompt_from_files`.
    """

    rows: int = 0
    prompt_tokens: int = 0
    prompt_shared: int = 0
    prompt_from_files: int = 0
    tokens: int = 0
    at_once: int = 0
    steps: int = 0
    row_steps: int = 0
    drafted: int = 0
    accepted: int = 0
    rejections: int = 0
    histogram: Counter[int] = field(default_factory=Counter)
    lengths: Counter[int] = field(default_factory=Counter)
    seconds: Seconds = field(default_factory=Seconds)

    @contextmanager
    def timed(self, phase: str, device: torch.device) -> Iterator[None]:
        """Add the seconds of a block to `phase`, waiting for a GPU to finish it."""
        start = time.perf_counter()
        yield
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        self.seconds[phase] += time.perf_counter() - start

    def count_step(self, drafted: list[int], accepted: list[int]) -> None:
        """Record one target pass, given each row's drafted and accepted counts."""
        self.steps += 1
        self.row_steps += len(drafted)
        self.drafted += sum(drafted)
        self.accepted += sum(accepted)
        # a draft ends at the first token that is rejected
        self.rejections += sum(n < length for length, n in zip(drafted, accepted, strict=True))
        self.histogram.update(accepted)
        self.lengths.update(drafted)

    def add(self, other: "DecodeStats") -> None:
        """Accumulate another batch of the same run."""
        for name, value in vars(other).items():
            if isinstance(value, Counter):
                getattr(self, name).update(value)
            elif isinstance(value, Seconds):
                for phase, seconds in value.items():
                    self.seconds[phase] += seconds
            else:
                setattr(self, name, getattr(self, name) + value)

    @property
    def acceptance(self) -> float:
        """Share of drafted tokens that the target kept; 0 when nothing was drafted."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def acceptance_per_token(self) -> float:
        """Share of the drafted tokens that were judged: those after a rejected one never are."""
        judged = self.accepted + self.rejections
        return self.accepted / judged if judged else 0.0

    @property
    def tokens_per_step(self) -> float:
        """Tokens one sequence gains from one target pass; 1 for plain decoding."""
        return (self.tokens - self.at_once) / self.row_steps if self.row_steps else 0.0

    @property
    def decode_seconds(self) -> float:
        """Seconds of drafting and verifying, after the prompts were read."""
        return self.seconds["draft"] + self.seconds["verify"]

    @property
    def tokens_per_second(self) -> float:
        """New tokens per second of decoding, all rows together, prompts apart."""
        taken = self.decode_seconds
        return (self.tokens - self.at_once) / taken if taken else 0.0

    @property
    def tokens_per_second_with_prefill(self) -> float:
        """New tokens per second from the first prompt token read to the last token written."""
        total = self.decode_seconds + self.seconds["prefill"]
        return self.tokens / total if total else 0.0

    def as_dict(self) -> dict[str, object]:
        """JSON-able counts, rates and seconds."""
        return {
            "rows": self.rows,
            "prompt_tokens": self.prompt_tokens,
            "prompt_shared": self.prompt_shared,
            "prompt_from_files": self.prompt_from_files,
            "tokens": self.tokens,
            "steps": self.steps,
            "drafted": self.drafted,
            "accepted": self.accepted,
            "acceptance": round(self.acceptance, 4),
            "tokens_per_step": round(self.tokens_per_step, 4),
            "tokens_per_second": round(self.tokens_per_second, 3),
            "tokens_per_second_with_prefill": round(self.tokens_per_second_with_prefill, 3),
            "accepted_histogram": {str(n): self.histogram[n] for n in sorted(self.histogram)},
            "seconds": {phase: round(value, 4) for phase, value in sorted(self.seconds.items())},
        }
