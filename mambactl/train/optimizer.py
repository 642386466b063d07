"""AdamW with two learning rates and the schedules, all plain functions of model and step."""

import math
from collections.abc import Iterable

import torch
from torch import nn

from mambactl.models.mixers.float32 import FLOAT32_PARAMETERS
from mambactl.models.mixers.registry import is_new

BETAS = (0.9, 0.95)
WEIGHT_DECAY = 0.01
FINAL_SHARE = 0.01
# RADLADS (arXiv 2505.03005) lowers its rate after 83 to 87 % of the tokens
DECAY_START = 0.85


def mixer_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters of the mixers that replaced attention, by name.

    Attention in a window beside a mixer is the teacher's, like the rest: the rate of new mixers
    would undo it.
    """
    return {name: p for name, p in model.named_parameters() if is_new(name)}


def rest_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters of everything else by name, a tied weight once."""
    return {name: p for name, p in model.named_parameters() if not is_new(name)}


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
    # besides being one pass, the fused form skips a step whose `found_inf` is 1 without being asked
    return torch.optim.AdamW(groups, betas=BETAS, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, share: float) -> None:
    """Give every group its share of its own peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * share


def warmup_of(warmup: int, steps: int) -> int:
    """Steps of warm-up that a phase really has: at most half of its own."""
    return min(warmup, steps // 2)


def schedule(step: int, steps: int, warmup: int, kind: str = "cosine") -> float:
    """Share of the peak rate at `step` (from 0): linear warm-up, then down to FINAL_SHARE.

    `cosine` falls all the way; `wsd` holds the peak until DECAY_START of the steps and falls then.
    """
    warmup = warmup_of(warmup, steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    start = max(warmup, int(DECAY_START * steps)) if kind == "wsd" else warmup
    done = max(0.0, (step - start) / max(1, steps - start))
    return FINAL_SHARE + (1 - FINAL_SHARE) * 0.5 * (1 + math.cos(math.pi * done))


def _decays(name: str, parameter: nn.Parameter) -> bool:
    return parameter.ndim > 1 and name.rsplit(".", 1)[-1] not in FLOAT32_PARAMETERS
