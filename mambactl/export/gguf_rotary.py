"""Rotary positions in a GGUF: keys for the common kinds, factors of frequencies for Llama 3."""

import torch
from torch import Tensor

from mambactl.checkpoint.gguf_writer import Value
from mambactl.export.exported_form import Origin, Step, cannot_hold
from mambactl.models.config import HybridConfig
from mambactl.models.positions import rotary_of

FACTORS = "rope_freqs.weight"


def rotary_metadata(origin: Origin, form: str) -> dict[str, Value]:
    """Keys of the rotation, without the architecture; ModelError for kinds that have none."""
    rotary = rotary_of(origin.config)
    kind = rotary.get("rope_type", "default")
    base: dict[str, Value] = {"rope.freq_base": float(rotary["rope_theta"])}
    if rotary.get("partial_rotary_factor", 1.0) != 1.0:
        raise cannot_hold(origin, "rotates a part of each head", form, None)
    if kind in ("default", "llama3"):
        return base
    if kind == "linear":
        return base | {"rope.scaling.type": kind, "rope.scaling.factor": float(rotary["factor"])}
    raise cannot_hold(origin, f"has rotary positions of the kind {kind}", form, None)


def rotary_steps(config: HybridConfig) -> list[Step]:
    """The tensor that divides the frequencies, where they are Llama 3's."""
    if rotary_of(config).get("rope_type") != "llama3":
        return []
    return [Step((), lambda: {FACTORS: _llama3_factors(config)})]


def _llama3_factors(config: HybridConfig) -> Tensor:
    """Divisor of every frequency [P / 2]: long waves are stretched, short ones are not."""
    rotary = rotary_of(config)
    even = torch.arange(0, config.head_dim, 2, dtype=torch.float64)
    waves = 2 * torch.pi * rotary["rope_theta"] ** (even / config.head_dim)  # tokens
    cycles = rotary["original_max_position_embeddings"] / waves
    low, high = rotary["low_freq_factor"], rotary["high_freq_factor"]
    smooth = ((cycles - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - smooth) / rotary["factor"] + smooth)).float()
