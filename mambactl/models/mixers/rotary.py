"""Positions for the state of a Mamba-2 mixer: B and C turn as keys and queries do in attention.

What a state returns for C_t of B_s then depends on t - s as the teacher's scores do
(RoFormer, arXiv 2104.09864, applied to the B and C of arXiv 2405.21060).
"""

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import rotate_half


def turn(states: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """B or C [B, T, G, N] turned by its position, `rotary` being (cos, sin) [B, T, N].

    The pair that turns fastest, channels 0 and N / 2, stays: with it a mixer holds a channel
    constant, which is its running mean (see `mambactl.models.init`).
    """
    size = states.shape[-1]
    still = torch.arange(size, device=states.device) % (size // 2) == 0  # [N]
    cos, sin = rotary
    cos = cos.masked_fill(still, 1).to(states.dtype).unsqueeze(-2)  # [B, T, 1, N]
    sin = sin.masked_fill(still, 0).to(states.dtype).unsqueeze(-2)
    return (states * cos + rotate_half(states) * sin).contiguous()
