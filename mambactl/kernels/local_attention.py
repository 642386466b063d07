"""Attention to the last tokens of a document and its first: a window with sinks.

StreamingLLM (arXiv 2309.17453) with positions as they are in the text. A query sees itself and
the `window` - 1 tokens before it, and the first `sinks` tokens of its document.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mambactl.kernels.dispatch import attention
from mambactl.kernels.spans import document_starts

# smaller blocks of queries would be mostly overhead
LEAST_BLOCK = 16


def local_attention(
    q: Tensor, k: Tensor, v: Tensor, window: int, sinks: int, seq_idx: Tensor | None = None
) -> Tensor:
    """Attention under `local_mask` for whole rows, in time and memory linear in T.

    q [B, H, T, P], k and v [B, Hk, T, P], seq_idx [B, T] -> [B, T, H, P].
    """
    length = q.shape[2]
    if seq_idx is None and length <= window + sinks:
        return attention(q, k, v)
    if length <= 2 * max(window, LEAST_BLOCK):
        return attention(q, k, v, local_mask(length, window, sinks, seq_idx, q.device))
    starts = torch.zeros(1, length, dtype=torch.long, device=q.device)
    if seq_idx is not None:
        starts = document_starts(seq_idx)
    return _banded(q, k, v, window, sinks, starts)


def local_mask(
    length: int, window: int, sinks: int, seq_idx: Tensor | None, device: torch.device
) -> Tensor:
    """Seen keys [B or 1, 1, T, T]: the definition."""
    key = torch.arange(length, device=device)
    query = key[:, None]
    starts = torch.zeros_like(query) if seq_idx is None else document_starts(seq_idx)[..., None]
    return _seen(query, key, starts, window, sinks).view(-1, 1, length, length)


def _seen(query: Tensor, key: Tensor, starts: Tensor, window: int, sinks: int) -> Tensor:
    """Whether queries of documents that begin at `starts` see keys, by their places in the row."""
    near = (key > query - window) | (key < starts + sinks)
    return (key <= query) & (key >= starts) & near


def _banded(q: Tensor, k: Tensor, v: Tensor, window: int, sinks: int, starts: Tensor) -> Tensor:
    """Blocks of queries, each against its own block of keys, the one before, and sinks.

    A document that began before both holds the whole block before, and so the first query of the
    block: sinks of one document are enough.
    """
    batch, _, length, _ = q.shape
    size = max(window, LEAST_BLOCK)
    blocks = -(-length // size)
    pad = blocks * size - length
    begin = torch.arange(blocks, device=q.device) * size  # [c]
    first = starts[:, begin].expand(batch, -1)  # [B, c]
    places = (first[..., None] + torch.arange(sinks, device=q.device)).clamp(max=length - 1)
    q = F.pad(q, (0, 0, 0, pad)).unflatten(2, (blocks, size))  # [B, H, c, L, P]
    k, v = (_band(t, size, pad, places) for t in (k, v))  # [B, Hk, c, S + 2 L, P]

    # padding sees itself, which keeps its softmax finite
    starts = F.pad(starts.expand(batch, -1), (0, pad)).view(batch, blocks, size, 1)
    query = begin[:, None, None] + torch.arange(size, device=q.device)[:, None]  # [c, L, 1]
    key = begin[:, None, None] - size + torch.arange(2 * size, device=q.device)  # [c, 1, 2 L]
    direct = _seen(query, key, starts, window, sinks)  # [B, c, L, 2 L]
    outside = places[:, :, None] < (begin - size)[:, None, None]  # [B, c, 1, S]
    far = outside & (starts == first[:, :, None, None])  # [B, c, L, S]
    mask = torch.cat([far, direct], -1).flatten(0, 1)[:, None]  # [B c, 1, L, S + 2 L]

    q, k, v = (t.transpose(1, 2).flatten(0, 1) for t in (q, k, v))
    y = attention(q, k, v, mask)  # [B c, L, H, P]
    return y.unflatten(0, (batch, blocks)).flatten(1, 2)[:, :length]


def _band(t: Tensor, size: int, pad: int, places: Tensor) -> Tensor:
    """Keys or values [B, Hk, T, P] of every block: sinks at `places` [B, c, S], then two blocks."""
    blocks = places.shape[1]
    index = places.flatten(1)[:, None, :, None].expand(-1, t.shape[1], -1, t.shape[3])
    sunk = t.gather(2, index).unflatten(2, (blocks, -1)) if places.shape[2] else None
    padded = F.pad(t, (0, 0, size, pad)).unflatten(2, (blocks + 1, size))
    parts = [padded[:, :, :-1], padded[:, :, 1:]]
    return torch.cat(parts if sunk is None else [sunk, *parts], 3)
