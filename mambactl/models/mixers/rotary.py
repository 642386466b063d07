"""Rotary positions, of queries and keys and of the state of a Mamba-2 mixer.

B and C turn as keys and queries do in attention (RoFormer, arXiv 2104.09864): what a state returns
for C_t of B_s (arXiv 2405.21060) then depends on t - s as the teacher's scores do.
"""

import torch
from torch import Tensor


def rotated(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Pairs of channels i and N / 2 + i of states [..., N] turned: RoFormer's, laid out as Llama's.

    Two halves of one split have one gradient, where two slices would have two to be added up.
    """
    one, other = states.chunk(2, -1)
    return states * cos + torch.cat((-other, one), -1) * sin


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
    return rotated(states, cos, sin).contiguous()
