"""Attention to the last tokens of a document and its first: a window with sinks.

StreamingLLM (arXiv 2309.17453) with positions as they are in the text. A query sees itself and
the `window` - 1 tokens before it, and the first `sinks` tokens of its document.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mambactl.kernels.dispatch import attention, fuses
from mambactl.kernels.reference import document_starts
from mambactl.present import present

# smaller blocks of queries would be mostly overhead
LEAST_BLOCK = 16
# sinks and channels of a head that one program of the fused kernel has room for
MOST_SINKS, MOST_CHANNELS = 16, 128


class LocalSpan(NamedTuple):
    """Keys that a query of a window sees, and the query heads that share a key head."""

    window: int
    sinks: int
    shared: int

    @property
    def before(self) -> int:
        """Most keys that a query sees beside its own."""
        return self.window - 1 + self.sinks


class LocalKeys(NamedTuple):
    """Keys that the queries of whole rows see, for every layer of one shape alike.

    Long rows go in blocks of L queries, and each sees its own block of keys, the one before, and
    the keys at `positions` [B, c, S]: `mask` is [B c, 1, g L, S + 2 L] then, the g query heads that
    share a key head behind each other. Other rows have no `positions`, and their `mask` is that of
    `local_mask`, or None where all of the past is seen. `packed` says that rows hold documents.
    """

    mask: Tensor | None
    positions: Tensor | None
    size: int
    span: LocalSpan
    packed: bool


def local_attention(
    q: Tensor, k: Tensor, v: Tensor, window: int, sinks: int, seq_idx: Tensor | None = None
) -> Tensor:
    """Attention under `local_mask` for whole rows, in time and memory linear in T.

    q [B, H, T, P], k and v [B, Hk, T, P], seq_idx [B, T] -> [B, T, H, P].
    """
    shared = q.shape[1] // k.shape[1]
    keys = local_keys(q.shape[0], q.shape[2], window, sinks, shared, seq_idx, q.device)
    return attend_locally(q, k, v, keys)


def local_keys(
    batch: int,
    length: int,
    window: int,
    sinks: int,
    shared: int,
    seq_idx: Tensor | None,
    device: torch.device,
) -> LocalKeys:
    """Keys that rows [B, T] see where `shared` query heads have one key head."""
    span, packed = LocalSpan(window, sinks, shared), seq_idx is not None
    if seq_idx is None and length <= window + sinks:
        return LocalKeys(None, None, length, span, packed)
    if length <= 2 * max(window, LEAST_BLOCK):
        mask = local_mask(length, window, sinks, seq_idx, device)
        return LocalKeys(mask, None, length, span, packed)
    starts = torch.zeros(1, length, dtype=torch.long, device=device)
    if seq_idx is not None:
        starts = document_starts(seq_idx)
    mask, positions, size = _blocks(starts.expand(batch, -1), window, sinks)
    mask = mask.flatten(0, 1)[:, None].repeat(1, 1, shared, 1)
    return LocalKeys(mask, positions, size, span, packed)


def attend_locally(
    q: Tensor, k: Tensor, v: Tensor, keys: LocalKeys, dropout: float = 0.0
) -> Tensor:
    """`local_attention` with what its rows see made already; `dropout` as in `attention`."""
    if keys.mask is not None and not keys.packed and not dropout and _fits(q, k, v, keys.span):
        from mambactl.kernels.sequence import local_attention as kernel

        with torch.cuda.device_of(q):
            return kernel.attend(q, k, v, keys.span.window, keys.span.sinks)
    if keys.positions is None:
        return attention(q, k, v, keys.mask, dropout=dropout)
    return _banded(q, k, v, keys, dropout)


def attend_behind(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: Tensor,
    span: LocalSpan,
    keys: LocalKeys | None,
    sequential: bool,
) -> Tensor:
    """Attention of queries [B, H, T, P] from position `start` [B] on -> [B, T, H, P].

    k and v [B, Hk, S + W - 1 + T, P]: of positions 0 to S - 1, of start - W + 1 to start - 1, and
    of the queries. A position below 0 is not seen, and one that stands there twice counts once.
    `keys` are those of a whole row of S + W - 1 + T tokens, where all rows have S + W - 1 before
    `start`. `sequential` tokens must round like the same tokens one by one.
    """
    if not sequential and _fits(q, k, v, span):
        from mambactl.kernels.sequence import local_attention as kernel

        with torch.cuda.device_of(q):
            return kernel.attend(q, k, v, span.window, span.sinks, start)
    if keys is not None:
        q = F.pad(q, (0, 0, span.before, 0))
        return attend_locally(q, k, v, keys)[:, span.before :]
    return attention(q, k, v, _mask_behind(start, q.shape[2], span))


def _mask_behind(start: Tensor, length: int, span: LocalSpan) -> Tensor:
    """Seen keys [B, 1, T, S + W - 1 + T] of `attend_behind`."""
    window, sinks = span.window, span.sinks
    sunk = torch.arange(sinks, device=start.device).expand(len(start), -1)  # [B, S]
    near = start[:, None] + torch.arange(1 - window, 0, device=start.device)  # [B, W - 1]
    new = start[:, None] + torch.arange(length, device=start.device)  # [B, T]
    position = torch.cat([sunk, near, new], 1)[:, None]  # [B, 1, S + W - 1 + T]
    real = torch.cat([sunk < start[:, None], near >= sinks, new >= 0], 1)[:, None]
    query = new[..., None]
    mask = real & (position <= query) & ((position > query - window) | (position < sinks))
    return mask[:, None]


def _fits(q: Tensor, k: Tensor, v: Tensor, span: LocalSpan) -> bool:
    """True if the kernel without gradients supports the call."""
    return (
        fuses(q, k, v)
        and q.dtype == k.dtype == v.dtype
        and span.sinks <= MOST_SINKS
        and q.shape[3] <= MOST_CHANNELS
    )


def local_mask(
    length: int, window: int, sinks: int, seq_idx: Tensor | None, device: torch.device
) -> Tensor:
    """Seen keys [B or 1, 1, T, T]: the definition."""
    key = torch.arange(length, device=device)
    query = key[:, None]
    starts = torch.zeros_like(query) if seq_idx is None else document_starts(seq_idx)[..., None]
    return _seen(query, key, starts, window, sinks).view(-1, 1, length, length)


def _seen(query: Tensor, key: Tensor, starts: Tensor, window: int, sinks: int) -> Tensor:
    """True where queries of documents that begin at `starts` see keys, by position in the row."""
    near = (key > query - window) | (key < starts + sinks)
    return (key <= query) & (key >= starts) & near


def _blocks(starts: Tensor, window: int, sinks: int) -> tuple[Tensor, Tensor, int]:
    """The mask [B, c, L, S + 2 L] of blocks of L queries, the positions [B, c, S] of sinks, L.

    A document that began before both blocks of keys holds the whole block before, and so the first
    query of the block: sinks of one document are enough.
    """
    batch, length = starts.shape
    size = max(window, LEAST_BLOCK)
    blocks = -(-length // size)
    begin = torch.arange(blocks, device=starts.device) * size  # [c]
    first = starts[:, begin]  # [B, c]
    positions = (first[..., None] + torch.arange(sinks, device=starts.device)).clamp(max=length - 1)

    # padding sees itself, which keeps its softmax finite
    starts = F.pad(starts, (0, blocks * size - length)).view(batch, blocks, size, 1)
    query = begin[:, None, None] + torch.arange(size, device=starts.device)[:, None]  # [c, L, 1]
    key = begin[:, None, None] - size + torch.arange(2 * size, device=starts.device)  # [c, 1, 2 L]
    direct = _seen(query, key, starts, window, sinks)  # [B, c, L, 2 L]
    outside = positions[:, :, None] < (begin - size)[:, None, None]  # [B, c, 1, S]
    far = outside & (starts == first[:, :, None, None])  # [B, c, L, S]
    return torch.cat([far, direct], -1), positions, size


def _banded(q: Tensor, k: Tensor, v: Tensor, keys: LocalKeys, dropout: float) -> Tensor:
    """Blocks of queries, each against its own keys.

    Heads that share keys become rows of one head: with a mask and fewer heads of keys than of
    queries, CUDA would take the unfused kernel that keeps every score.
    """
    positions, size = present(keys.positions), keys.size
    blocks, length, heads = positions.shape[1], q.shape[2], k.shape[1]
    pad = blocks * size - length
    if pad:
        q, k, v = (F.pad(t, (0, 0, 0, pad)) for t in (q, k, v))
    k, v = _bands(torch.cat([k, v], 1), size, positions).flatten(0, 1).split(heads, 1)
    q = q.unflatten(2, (blocks, size)).transpose(1, 2)  # [B, c, H, L, P]
    q = q.flatten(0, 1).unflatten(1, (heads, -1)).flatten(2, 3)  # [B c, Hk, g L, P]
    y = attention(q, k, v, keys.mask, dropout=dropout)  # [B c, g L, Hk, P]
    y = y.unflatten(1, (-1, size)).permute(0, 2, 3, 1, 4).flatten(2, 3)  # [B c, L, H, P]
    return y.unflatten(0, (-1, blocks)).flatten(1, 2)[:, :length]


def _bands(t: Tensor, size: int, positions: Tensor) -> Tensor:
    """Parts of t [B, H, T, P] that blocks see: sinks at `positions`, the block before, their own.

    Returns [B, c, H, S + 2 L, P].
    """
    own = t.unflatten(2, (-1, size))  # [B, H, c, L, P]
    before = F.pad(own, (0, 0, 0, 0, 1, -1))
    parts = [before, own]
    if positions.shape[2]:
        index = positions.flatten(1)[:, None, :, None].expand(-1, t.shape[1], -1, t.shape[3])
        parts = [t.gather(2, index).unflatten(2, (positions.shape[1], -1)), *parts]
    return torch.cat([part.transpose(1, 2) for part in parts], 3)
