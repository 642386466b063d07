"""Sampling of tokens: parameters, the distribution drawn from, a batch's sampler."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mambactl.errors import UsageError
from mambactl.kernels.decode.reference.verdict import smallest_kept
from mambactl.kernels.random import Stream, draw, uniform
from mambactl.options.fields import COOLEST, is_temperature

__all__ = ["Sampler", "SamplingParams", "Stream", "draw", "filtered_probs", "uniform"]


@dataclass(frozen=True)
class SamplingParams:
    """Parameters of `generate`; temperature 0 is greedy, top_k 0 and top_p 1 are off."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    max_new_tokens: int = 128
    eos_token_ids: tuple[int, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("temperature", "top_p"):
            self._require(name, (int, float))
        for name in ("top_k", "max_new_tokens", "seed"):
            self._require(name, (int,))
        if not is_temperature(self.temperature):
            raise UsageError(
                f"temperature {self.temperature}: it is 0 (greedy) or at least {COOLEST:g}"
            )
        if self.top_k < 0 or not 0 < self.top_p <= 1:
            raise UsageError("top_k must be at least 0 and top_p in (0, 1]")
        if self.max_new_tokens < 1:
            raise UsageError("max_new_tokens must be at least 1")

    def _require(self, name: str, kinds: tuple[type, ...]) -> None:
        value = getattr(self, name)
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise UsageError(f"{name} is {value!r}, which is no number")

    @property
    def greedy(self) -> bool:
        """True when tokens are argmaxes and no randomness is used."""
        return self.temperature == 0


def filtered_probs(
    logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> Tensor:
    """Turn logits [..., V] into the fp32 distribution that tokens are drawn from.

    Temperature, then top-k (ties with the k-th logit stay), then top-p (the smallest set of most
    likely tokens whose mass reaches top_p, and ties with the last of them), along the last axis.
    """
    if temperature <= 0:
        raise ValueError("a distribution needs temperature > 0; greedy decoding takes the argmax")
    scaled = logits.float() / temperature  # [..., V]
    outside = scaled < smallest_kept(scaled, top_k, top_p)
    return scaled.masked_fill(outside, float("-inf")).softmax(-1)


class Sampler:
    """Chooses tokens for the rows of one running batch; `keys` name the rows across batches."""

    def __init__(self, params: SamplingParams, keys: Sequence[int], device: torch.device | str):
        self.params = params
        self.keys = torch.tensor(list(keys), dtype=torch.long, device=device)  # [B]

    def keep(self, rows: Tensor) -> None:
        """Drop every row but `rows` [R], in that order."""
        self.keys = self.keys[rows]

    def probs(self, logits: Tensor) -> Tensor:
        """The distribution this run draws from, [..., V] fp32."""
        params = self.params
        return filtered_probs(logits, params.temperature, params.top_k, params.top_p)

    def uniform(self, positions: Tensor, stream: Stream) -> Tensor:
        """Uniform numbers for positions [B] or [B, K] of each row's generated text."""
        keys = self.keys if positions.dim() == 1 else self.keys[:, None].expand_as(positions)
        return uniform(self.params.seed, keys, positions, stream)
