"""Llama's norm in one kernel, where torch has one for the device, in place of six."""

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm

HALVES = (torch.bfloat16, torch.float16)


class RMSNorm(LlamaRMSNorm):
    """x / sqrt(mean(x^2) + eps) times a weight, rounded where Llama's is."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """x [..., D] -> [..., D]."""
        width, eps, kind = self.weight.shape, self.variance_epsilon, hidden_states.dtype
        if self.weight.dtype == kind and kind not in HALVES:
            return F.rms_norm(hidden_states, width, self.weight, eps)
        # a half is rounded before the weight multiplies it
        return self.weight * F.rms_norm(hidden_states.float(), width, None, eps).to(kind)


def rotated(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Pairs of channels i and N / 2 + i of states [..., N] turned: RoFormer's, laid out as Llama's.

    Two halves of one split have one gradient, where two slices would have two to be added up.
    """
    one, other = states.chunk(2, -1)
    return states * cos + torch.cat((-other, one), -1) * sin


def turn(states: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """B or C [B, T, G, N] turned by its position, `rotary` being (cos, sin) [B, T, N]."""
    half = states.shape[-1] // 2
    cos, sin = rotary
    cos = still(cos, 1.0, half).to(states.dtype).unsqueeze(-2)  # [B, T, 1, N]
    sin = still(sin, 0.0, half).to(states.dtype).unsqueeze(-2)
    return rotated(states, cos, sin).contiguous()


def still(rotation: Tensor, value: float, half: int | None = None) -> Tensor:
    """Cosines or sines [..., N] or [..., N / 2] for states: the pair that turns fastest stays.

    That is channels 0 and N / 2 of N = 2 * `half`; with it a mixer holds a channel constant, which
    is its running mean (see `mambactl.conversion.initial_values`).
    """
    channel = torch.arange(rotation.shape[-1], device=rotation.device)
    return rotation.masked_fill(channel % (half or rotation.shape[-1]) == 0, value)
