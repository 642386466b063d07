"""The recurrence of Mamba-2 over few tokens, in closed form or as one step."""

import torch
import torch.nn.functional as F
from torch import Tensor

from mambactl.kernels.decode.cpu.pass_rows import Group


def heads_of(values: Tensor, groups: int, heads: int) -> Tensor:
    """[n, L, groups * W] -> [n, H, L, W], each group repeated for its heads."""
    n, length, width = values.shape
    parts = values.view(n, length, groups, width // groups).transpose(1, 2)  # [n, G, L, W]
    if groups == heads:
        return parts
    repeated = parts[:, :, None].expand(-1, -1, heads // groups, -1, -1)
    return repeated.reshape(n, heads, length, width // groups)


def advance(
    state: Tensor, x: Tensor, dt: Tensor, a: Tensor, B: Tensor, C: Tensor, group: Group
) -> tuple[Tensor, Tensor]:
    """Outputs [n, H, fresh, P] of a group's new tokens, and the state after `keep` steps.

    state [n, H, N, P] fp32; x [n, H, L, P]; dt and a = dt A [n, H, L]; B [n, H, L, N] and C of the
    new tokens alone, [n, H, fresh, N]. arXiv 2405.21060, equation 6 for one token, its quadratic
    form for several. The state is changed in place where that is right.
    """
    weighted = x * dt[..., None]  # [n, H, L, P]
    if group.size == 1:
        following = state if group.keep else state.clone()
        following.mul_(a.exp()[..., None]).addcmul_(B.mT, weighted)
        return C @ following, following
    total = a.cumsum(-1)  # [n, H, L]
    fresh, keep = group.fresh, group.keep
    ages = total[..., -fresh:, None] - total[..., None, :]  # [n, H, fresh, L]
    later = torch.ones(ages.shape[-2:], dtype=torch.bool).triu(1 + group.size - fresh)
    mixing = (C @ B.mT) * ages.masked_fill(later, float("-inf")).exp()  # [n, H, fresh, L]
    y = mixing @ weighted + total[..., -fresh:, None].exp() * (C @ state)  # [n, H, fresh, P]
    if keep:
        left = (total[..., keep - 1, None] - total[..., :keep]).exp()[..., None]  # [n, H, keep, 1]
        state.mul_(total[..., keep - 1, None, None].exp())
        state.add_(B[:, :, :keep].mT @ (weighted[:, :, :keep] * left))
    return y, state


def gated(y: Tensor, z: Tensor, gain: Tensor | None, eps: float) -> Tensor:
    """y SiLU(z) for y [n, H, fresh, P] and z [n, fresh, H P], RMS-normed by head with `gain`."""
    y = y.transpose(1, 2)  # [n, fresh, H, P]
    y = y * F.silu(z).view(y.shape)
    if gain is not None:
        # the library's own norm takes ten times as long for so few numbers
        rate = y.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        y = y * rate * gain.view(y.shape[-2:])
    return y.flatten(2)
