"""Counter-based random numbers, and how one of them chooses a token.

Each uniform number is a pure function of (seed, row key, position, stream), hashed with the
splitmix64 finaliser (Steele, Lea and Flood, "Fast splittable pseudorandom number generators",
2014). Nothing is drawn from a shared generator, so the tokens of a row depend neither on the
other rows of its batch nor on how the work is cut into steps on their behalf.
"""

from collections.abc import Sequence
from enum import IntEnum

import torch
from torch import Tensor

GOLDEN = -0x61C8864680B583EB
MIX_1 = -0x40A7B892E31B1A47
MIX_2 = -0x6B2FB644ECCEEE15
# 48 bits: u * total stays below total after rounding in float64, also for the largest u
UNIFORM_BITS = 48


class Stream(IntEnum):
    """Use of a uniform number; one position draws each at most once per prefix."""

    PROPOSE = 0
    ACCEPT = 1
    EMIT = 2


def uniform(seed: int, keys: Tensor, positions: Tensor, stream: int) -> Tensor:
    """Uniform float64 numbers in [0, 1) for int64 `keys` and `positions` of one broadcast shape."""
    start = torch.full_like(keys, as_int64(seed + GOLDEN))
    mixed = _mix(start)
    mixed = _mix(mixed + keys + GOLDEN)
    mixed = _mix(mixed + positions + GOLDEN)
    mixed = _mix(mixed + int(stream) + GOLDEN)
    return _shift(mixed, 64 - UNIFORM_BITS).double() * 2.0**-UNIFORM_BITS


def keys_under(base: int, seeds: Sequence[int], keys: Sequence[int]) -> list[int]:
    """The keys that give under the seed `base` the numbers of `keys` under their `seeds`.

    Rows with seeds of their own can so be drawn from together.
    """
    of_base, *of_seeds = _mix(torch.tensor([as_int64(s + GOLDEN) for s in (base, *seeds)])).tolist()
    return [as_int64(key + own - of_base) for key, own in zip(keys, of_seeds, strict=True)]


def draw(probs: Tensor, uniforms: Tensor) -> Tensor:
    """Invert the cumulative distribution: probs [..., V] (any scale), uniforms [...] -> ids [...].

    The sum runs in float64, so tokens of probability zero are never drawn.
    """
    cumulative = probs.double().cumsum(-1)  # [..., V]
    threshold = uniforms.unsqueeze(-1) * cumulative[..., -1:]  # [..., 1]
    return torch.searchsorted(cumulative, threshold, right=True).squeeze(-1)  # [...]


def as_int64(value: int) -> int:
    """The signed 64-bit integer that has the lowest 64 bits of `value`, of any size."""
    return (value + 2**63) % 2**64 - 2**63


def _shift(value: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64 values, which torch only has as an arithmetic one."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def _mix(value: Tensor) -> Tensor:
    value = (value ^ _shift(value, 30)) * MIX_1
    value = (value ^ _shift(value, 27)) * MIX_2
    return value ^ _shift(value, 31)
