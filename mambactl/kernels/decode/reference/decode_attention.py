"""Attention of a segment of new tokens over the keys and values a model keeps per sequence."""

import math

import torch
from torch import Tensor

from mambactl.kernels.decode.reference.slots import positions_held
from mambactl.kernels.reference import state_dtype


def partial_shape(B: int, Hk: int, rows: int, P: int, splits: int) -> tuple[int]:
    """Shape of `partial` (fp32) of `decode_attention`: rows = T * H / Hk query rows per KV head.

    Any larger buffer serves too, so one made for the longest segment serves all.
    """
    return (B * Hk * rows * splits * (P + 2) if splits > 1 else 0,)


def counter_shape(B: int, Hk: int, rows: int) -> tuple[int]:
    """Shape of `counter` (int32) of `decode_attention`: one per sequence, KV head and row tile.

    It must be zero before the first launch, and every launch leaves it so; larger serves too.
    """
    return (B * Hk * -(-rows // 16),)


def decode_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    start: Tensor,
    count: Tensor,
    scale: int,
    out: Tensor,
    partial: Tensor | None,
    counter: Tensor | None,
    *,
    T: int,
    offset: int = 0,
    splits: int,
    window: int = 0,
    sinks: int = 0,
    ring: int = 0,
    block_k: int = 64,
    pdl: bool = False,
) -> None:
    """softmax(q k^T / sqrt(P)) v of T new tokens per sequence over the cache, written to `out`.

    q and out [M, H*P], rope applied; keys and values [B, Hk, S, P] with Hk dividing H, the new
    tokens' own among them; start and count int32 [B]. Row t of sequence b stands at position
    start[b] + offset + t and sees those up to its own, with `window` > 0 only the last `window`
    of them and the first `sinks` of all. A position is at its own slot, or with `ring` > 0 where
    `slots.slot_of` says; a ring has at least window + T - 1 slots. Rows from count[b] * scale on,
    and rows before position 0, are left as they are; what slots hold that nobody sees does not
    matter. The other arguments are the kernel's.
    """
    B, Hk, S, P = keys.shape
    kind = state_dtype(q)
    step = torch.arange(T, device=q.device)
    n_new = (count * scale)[:, None]  # [B, 1]
    begin = start[:, None] + offset  # [B, 1]
    position = (begin + step)[..., None]  # [B, T, 1]
    held = positions_held((begin + n_new)[:, 0], S, sinks, ring)[:, None]  # [B, 1, S]
    seen = (held >= 0) & (held <= position)  # [B, T, S]
    if window > 0:
        seen = seen & ((held > position - window) | (held < sinks))
    unused = ~(seen & (step < n_new)[..., None]).any(1)[:, None, :, None]  # [B, 1, S, 1]
    keys, values = (x.masked_fill(unused, 0).to(kind) for x in (keys, values))
    query = q.view(B, T, Hk, -1, P).to(kind)  # [B, T, Hk, G, P]
    scores = torch.einsum("bthgp,bhsp->bthgs", query, keys) / math.sqrt(P)
    weights = scores.masked_fill(~seen[:, :, None, None], float("-inf")).softmax(-1)
    y = torch.einsum("bthgs,bhsp->bthgp", weights, values).reshape(out.shape).to(out.dtype)
    live = ((step < n_new) & (begin + step >= 0)).view(-1, 1)  # [M, 1]
    out.copy_(torch.where(live, y, out))
