"""Which keys a query of a packed row sees: one stretch that ends with the query itself."""

from typing import NamedTuple

import torch
from torch import Tensor


class Spans(NamedTuple):
    """int32 [B, T]: the first key a query sees, and the end of the queries that see a key.

    Both grow along a row, as documents and sliding windows make them.
    """

    starts: Tensor
    ends: Tensor

    def mask(self) -> Tensor:
        """Seen keys [B, 1, T, T]."""
        at = torch.arange(self.starts.shape[1], device=self.starts.device)
        return ((at <= at[:, None]) & (at >= self.starts[..., None]))[:, None]


def document_starts(seq_idx: Tensor) -> Tensor:
    """Where the document of every token of a row begins, [B, T]."""
    at = torch.arange(seq_idx.shape[1], device=seq_idx.device).expand(seq_idx.shape)
    first = at[:, 1:].masked_fill(seq_idx[:, 1:] == seq_idx[:, :-1], 0)
    return torch.nn.functional.pad(first, (1, 0)).cummax(1).values


def spans(seq_idx: Tensor | None, like: Tensor, window: int | None) -> Spans:
    """What tokens of `like` [B, T] see: their own document, the last `window` tokens of it."""
    at = torch.arange(like.shape[1], device=like.device).expand(like.shape)
    starts = torch.zeros_like(at)
    if seq_idx is not None:
        starts = document_starts(seq_idx)
    if window:
        starts = torch.maximum(starts, at - window + 1)
    ends = torch.searchsorted(starts, at.contiguous(), right=True)
    return Spans(starts.int(), ends.int())
