"""Positions for the state of a Mamba-2 mixer: B and C turn as keys and queries do in attention.

What a state returns for C_t of B_s then depends on t - s as the teacher's scores do
(RoFormer, arXiv 2104.09864, applied to the B and C of arXiv 2405.21060).
"""

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import rotate_half


def turn(states: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """B or C [B, T, G, N] turned by its position, `rotary` being (cos, sin) [B, T, N]."""
    half = states.shape[-1] // 2
    cos, sin = rotary
    cos = still(cos, 1.0, half).to(states.dtype).unsqueeze(-2)  # [B, T, 1, N]
    sin = still(sin, 0.0, half).to(states.dtype).unsqueeze(-2)
    return (states * cos + rotate_half(states) * sin).contiguous()


def still(rotation: Tensor, value: float, half: int | None = None) -> Tensor:
    """Cosines or sines [..., N] or [..., N / 2] for states: the pair that turns fastest stays.

    That is channels 0 and N / 2 of N = 2 * `half`; with it a mixer holds a channel constant, which
    is its running mean (see `mambactl.models.init`).
    """
    channel = torch.arange(rotation.shape[-1], device=rotation.device)
    return rotation.masked_fill(channel % (half or rotation.shape[-1]) == 0, value)
