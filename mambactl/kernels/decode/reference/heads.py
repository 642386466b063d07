"""Steps of model families on queries and keys between their projections and their scores."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mambactl.kernels import reference
from mambactl.kernels.decode.operations import AttentionArguments
from mambactl.kernels.decode.reference.linear import segment_positions, wide
from mambactl.kernels.decode.reference.slots import slot_of


def settle_heads(
    parts: Sequence[AttentionArguments], gains: Sequence[tuple[Tensor, Tensor]], eps: float,
    factor: float, rotation: tuple[Tensor, Tensor] | None, start: Tensor, count: Tensor,
    scale: int, *, T: int, offset: int, joint: bool = False,
) -> None:  # fmt: skip
    """Norm, rotate and scale queries [M, H P], and norm and rotate the keys of the same rows.

    Both are as `project_qkv` leaves them without a rotation. `gains` are those of queries and of
    keys for each part: [P] of norms of each head, or where they are `joint` [H P] and [Hk P] of
    one norm over the heads of all parts; none at all where there is no norm. `rotation` (cos, sin)
    [S, P / 2] is None where nothing rotates; `factor` is of the queries.
    """
    at, real = segment_positions(start, count, scale, T=T, offset=offset)
    b, t = real.nonzero(as_tuple=True)
    at = at[b, t]
    queries = [part.q.view(len(start), T, part.heads, -1)[b, t] for part in parts]
    slots = [slot_of(at, part.sinks, part.ring) for part in parts]
    keys = [part.keys[b, :, slot] for part, slot in zip(parts, slots, strict=True)]
    if gains:
        queries = _normed(queries, [pair[0] for pair in gains], eps, joint)
        keys = _normed(keys, [pair[1] for pair in gains], eps, joint)
    for part, slot, q, k in zip(parts, slots, queries, keys, strict=True):
        q, k = (_rotated(heads, rotation, at) for heads in (q, k))
        part.q.view(len(start), T, part.heads, -1)[b, t] = (q * factor).to(part.q.dtype)
        part.keys[b, :, slot] = k.to(part.keys.dtype)


def _normed(parts: list[Tensor], gains: list[Tensor], eps: float, joint: bool) -> list[Tensor]:
    """Heads [R, H, P] of each part under their norms, rounded where the model's own are."""
    if not joint:
        return [
            reference.rms_norm(heads, gain, eps) for heads, gain in zip(parts, gains, strict=True)
        ]
    size = sum(heads[0].numel() if len(heads) else 1 for heads in parts)
    squares = torch.stack([wide(heads).square().sum((1, 2)) for heads in parts]).sum(0)  # [R]
    mean = squares[:, None] / size  # [R, 1]
    return [
        reference.norm_by(heads.flatten(1), mean, gain, eps).view_as(heads)
        for heads, gain in zip(parts, gains, strict=True)
    ]


def _rotated(heads: Tensor, rotation: tuple[Tensor, Tensor] | None, at: Tensor) -> Tensor:
    """Heads [R, H, P] at positions [R], in fp32."""
    if rotation is None:
        return wide(heads)
    c, s = (table[at][:, None] for table in rotation)  # [R, 1, P / 2]
    low, high = wide(heads).chunk(2, -1)
    return torch.cat([low * c - high * s, high * c + low * s], -1)
