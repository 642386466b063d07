"""How tokens are chosen, and the counter-based randomness behind every choice.

Each uniform number is a pure function of (seed, row key, position, stream), hashed with the
splitmix64 finaliser (Steele, Lea and Flood, "Fast splittable pseudorandom number generators",
2014). Nothing is drawn from a shared generator, so the tokens of a row depend neither on the
other rows of its batch nor on how the work is cut into steps on their behalf.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

GOLDEN = -0x61C8864680B583EB
MIX_1 = -0x40A7B892E31B1A47
MIX_2 = -0x6B2FB644ECCEEE15
# 48 bits: u * total stays below total after rounding in float64, also for the largest u
UNIFORM_BITS = 48


class Stream(IntEnum):
    """What a uniform number is used for; one position draws each at most once per prefix."""

    PROPOSE = 0
    ACCEPT = 1
    EMIT = 2


@dataclass(frozen=True)
class SamplingParams:
    """What `generate` is asked for; temperature 0 is greedy, top_k 0 and top_p 1 are off."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    max_new_tokens: int = 128
    eos_token_ids: tuple[int, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ValueError("temperature and top_k must be >= 0 and top_p in (0, 1]")
        if self.max_new_tokens < 1:
            raise ValueError("max_new_tokens must be at least 1")

    @property
    def greedy(self) -> bool:
        """True when tokens are argmaxes and no randomness is used."""
        return self.temperature == 0


def filtered_probs(
    logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> Tensor:
    """Turn logits [..., V] into the fp32 distribution that tokens are drawn from.

    Temperature, then top-k (ties with the k-th logit stay), then top-p (the smallest set of most
    likely tokens whose mass reaches top_p), always along the last axis.
    """
    if temperature <= 0:
        raise ValueError("a distribution needs temperature > 0; greedy decoding takes the argmax")
    scaled = logits.float() / temperature  # [..., V]
    if 0 < top_k < scaled.shape[-1]:
        kth = scaled.topk(top_k, dim=-1).values[..., -1:]  # [..., 1]
        scaled = scaled.masked_fill(scaled < kth, float("-inf"))
    probs = scaled.softmax(-1)  # [..., V]
    if top_p >= 1:
        return probs
    ranked, order = probs.sort(dim=-1, descending=True, stable=True)  # [..., V]
    outside = ranked.cumsum(-1) - ranked >= top_p
    probs = probs.masked_fill(torch.zeros_like(outside).scatter(-1, order, outside), 0.0)
    return probs / probs.sum(-1, keepdim=True)


def uniform(seed: int, keys: Tensor, positions: Tensor, stream: Stream) -> Tensor:
    """Uniform float64 numbers in [0, 1) for int64 `keys` and `positions` of one broadcast shape."""
    start = torch.full_like(keys, _signed(seed + GOLDEN))
    mixed = _mix(start)
    mixed = _mix(mixed + keys + GOLDEN)
    mixed = _mix(mixed + positions + GOLDEN)
    mixed = _mix(mixed + int(stream) + GOLDEN)
    return _shift(mixed, 64 - UNIFORM_BITS).double() * 2.0**-UNIFORM_BITS


def draw(probs: Tensor, uniforms: Tensor) -> Tensor:
    """Invert the cumulative distribution: probs [..., V] (any scale), uniforms [...] -> ids [...].

    The sum runs in float64, so tokens of probability zero are never drawn.
    """
    cumulative = probs.double().cumsum(-1)  # [..., V]
    threshold = uniforms.unsqueeze(-1) * cumulative[..., -1:]  # [..., 1]
    return torch.searchsorted(cumulative, threshold, right=True).squeeze(-1)  # [...]


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


def _signed(value: int) -> int:
    return (value + 2**63) % 2**64 - 2**63


def _shift(value: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64 values, which torch only has as an arithmetic one."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def _mix(value: Tensor) -> Tensor:
    value = (value ^ _shift(value, 30)) * MIX_1
    value = (value ^ _shift(value, 27)) * MIX_2
    return value ^ _shift(value, 31)
