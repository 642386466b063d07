"""AdamW with two learning rates and the schedule, both plain functions of model and step."""

import math
from collections.abc import Iterable

import torch
from torch import nn

from mambactl.models.mixers.float32 import FLOAT32_PARAMETERS

BETAS = (0.9, 0.95)
WEIGHT_DECAY = 0.01
FINAL_SHARE = 0.01


def mixer_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters of the Mamba mixers by name."""
    return {name: p for name, p in model.named_parameters() if ".mamba." in name}


def rest_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters of everything else by name, a tied weight once."""
    return {name: p for name, p in model.named_parameters() if ".mamba." not in name}


def build_optimizer(
    parts: Iterable[tuple[dict[str, nn.Parameter], float]],
) -> torch.optim.AdamW:
    """AdamW over (parameters, learning rate) parts; vectors, A_log, D and dt_bias never decay."""
    groups = []
    for parameters, rate in parts:
        for decay in (WEIGHT_DECAY, 0.0):
            members = [p for name, p in parameters.items() if _decays(name, p) == (decay > 0)]
            if members:
                groups.append({"params": members, "lr": rate, "peak": rate, "weight_decay": decay})
    fused = all(p.is_cuda for group in groups for p in group["params"])
    return torch.optim.AdamW(groups, betas=BETAS, fused=fused)


def set_learning_rate(optimizer: torch.optim.Optimizer, share: float) -> None:
    """Give every group its share of its own peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * share


def schedule(step: int, steps: int, warmup: int) -> float:
    """Share of the peak rate at `step` (from 0): linear warm-up, then cosine to FINAL_SHARE.

    Warm-up takes at most half of the steps.
    """
    warmup = min(warmup, steps // 2)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, steps - warmup)
    return FINAL_SHARE + (1 - FINAL_SHARE) * 0.5 * (1 + math.cos(math.pi * done))


def _decays(name: str, parameter: nn.Parameter) -> bool:
    return parameter.ndim > 1 and name.rsplit(".", 1)[-1] not in FLOAT32_PARAMETERS
