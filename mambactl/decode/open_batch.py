"""A batch that rows join and leave between steps: what a server decodes with.

A row brings its own sampling and its own prompt, which was read before (`PromptReading`), so that
nothing about its text depends on the rows beside it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from mambactl.decode.prompt_reading import ReadPrompt, ReadRows
from mambactl.decode.sampler import SamplingParams

# alternatives that are looked up where a row wants to know how likely tokens were
MOST_ALTERNATIVES = 20


@dataclass(frozen=True)
class RowRequest:
    """A row to decode; `key` names it for sampling, as in `Engine.generate`.

    `likely`: its tokens come with their log-probabilities.
    """

    params: SamplingParams
    key: int = 0
    likely: bool = False


@dataclass(frozen=True)
class Likely:
    """Log-probability of a token in the model's own distribution, and the most likely tokens."""

    logprob: float
    top: tuple[tuple[int, float], ...]


class Written(NamedTuple):
    """Tokens that a step added to a row; after a `finish` the row has left.

    An eos token is part of the tokens.
    """

    row: int
    tokens: list[int]
    likely: list[Likely] | None = None
    finish: str | None = None
    drafted: int = 0
    accepted: int = 0


class OpenBatch(Protocol):
    """Rows under way; numbers that the caller chose name them."""

    @property
    def room(self) -> int:
        """Number of rows that may still join."""
        ...

    @property
    def running(self) -> int:
        """Number of rows under way."""
        ...

    def join(self, row: int, request: RowRequest, prompt: ReadPrompt) -> None:
        """Add a row, whose first token comes with one of the next steps."""

    def join_all(self, rows: Sequence[tuple[int, RowRequest]], read: ReadRows) -> None:
        """Add a row for each of the prompts that were read together, as `join` does."""

    def leave(self, row: int) -> None:
        """Drop a row before the next step; one that is not under way is ignored."""

    def step(self) -> list[Written]:
        """Take every row a token further, or several; tokens may arrive some steps late."""
        ...


@dataclass(frozen=True)
class LikelyTable:
    """Log-probabilities of a pass's tokens: each one's own and those of the most likely ones."""

    own: Tensor  # [B, T]
    values: Tensor  # [B, T, MOST_ALTERNATIVES]
    tokens: Tensor  # [B, T, MOST_ALTERNATIVES]

    @classmethod
    def of(cls, logits: Tensor, tokens: Tensor) -> "LikelyTable":
        """Look up tokens [B, T], and the most likely ones, in logits [B, T, V]."""
        logits = logits.float()
        mass = logits.logsumexp(-1, keepdim=True)
        most = logits.topk(min(MOST_ALTERNATIVES, logits.shape[-1]), -1)
        own = logits.gather(-1, tokens.long()[..., None]) - mass
        return cls(own[..., 0], most.values - mass, most.indices)

    def on_host(self) -> "LikelyTable":
        """A copy that has arrived when the device has done what it was given so far."""
        return LikelyTable(*map(_on_host, (self.own, self.values, self.tokens)))

    def row(self, index: int, count: int) -> list[Likely]:
        """The first tokens of a row."""
        own, values, tokens = (
            part[index, :count].tolist() for part in (self.own, self.values, self.tokens)
        )
        return [
            Likely(each, tuple(zip(ids, those, strict=True)))
            for each, those, ids in zip(own, values, tokens, strict=True)
        ]


def _on_host(tensor: Tensor) -> Tensor:
    if tensor.device.type == "cpu":
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)
