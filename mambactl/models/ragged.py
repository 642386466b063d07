"""Rows with padding and with several documents, as the mixers take them.

Mixers know no padding: its columns go to the end of their rows, which are ragged then (`n_new` in
`mambactl.kernels.reference`), and what comes out goes back to where it was.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Ragged:
    """How many tokens of each row are real, n_new [B], and their columns before padding [B, T].

    Both are None where all are real.
    """

    n_new: Tensor | None = None
    order: Tensor | None = None

    def sort(self, t: Tensor) -> Tensor:
        """Columns of t [B, T] or [B, T, D], real ones first."""
        return t if self.order is None else take(t, self.order)

    def restore(self, t: Tensor) -> Tensor:
        """Columns of t [B, T, D] where they were before `sort`."""
        return t if self.order is None else take(t, self.order.argsort(1).to(t.device))


def take(t: Tensor, columns: Tensor) -> Tensor:
    """Columns [B, T'] of t [B, T, ...]."""
    index = columns.view(*columns.shape, *[1] * (t.ndim - 2))
    return t.gather(1, index.expand(*columns.shape, *t.shape[2:]))


def without_padding(attention_mask: Tensor | None, n_new: Tensor | None, length: int) -> Ragged:
    """Which of `length` columns are real: those with a 1 in a mask [B, T] or [B, past + T].

    ValueError for a mask with other dimensions.
    """
    if n_new is not None or attention_mask is None:
        return Ragged(n_new)
    if attention_mask.ndim != 2:
        raise ValueError("HybridModel takes a 2-D attention mask [B, T] of ones and zeros")
    mask = attention_mask[:, -length:].bool()
    # a program that is exported cannot ask
    if not torch.compiler.is_exporting() and bool(mask.all()):
        return Ragged()
    order = (~mask).to(torch.uint8).argsort(dim=1, stable=True)  # [B, T]
    return Ragged(mask.sum(1), order)


def documents(position_ids: Tensor, n_new: Tensor | None) -> Tensor | None:
    """Numbers [B, T] of the documents in packed rows, whose positions do not go on by one.

    None if every row has only one.
    """
    restarts = position_ids[:, 1:] != position_ids[:, :-1] + 1  # [B, T-1]
    if n_new is not None:
        later = torch.arange(1, position_ids.shape[1], device=n_new.device)
        restarts = restarts & (later < n_new[:, None])
    # a program that is exported cannot ask
    if not torch.compiler.is_exporting() and not bool(restarts.any()):
        return None
    return F.pad(restarts.cumsum(1), (1, 0))


def maps_by_column(
    maps: list[Tensor], rows: Ragged, attention_mask: Tensor | None, columns: int, padded: bool
) -> tuple[Tensor, ...]:
    """Attention weights [B, H, T, S] by key slot as weights [B, H, T, columns] by column.

    Slots count the real tokens of a row, and `padded` says that some columns in the cache hold
    none. ValueError where the mask does not cover all columns.
    """
    if not padded and (attention_mask is None or bool(attention_mask.all())):
        return tuple(maps)
    if attention_mask is None or attention_mask.shape[1] != columns:
        raise ValueError(
            f"output_attentions needs an attention_mask of all {columns} columns, those in the "
            "cache among them"
        )
    real = attention_mask.bool()
    slot = (real.cumsum(1) - 1).clamp(min=0)[:, None, None]  # [B, 1, 1, columns]
    found = []
    for weights in maps:
        weights = rows.restore(weights.transpose(1, 2)).transpose(1, 2)
        index = slot.to(weights.device).clamp(max=weights.shape[3] - 1)
        index = index.expand(*weights.shape[:3], -1)
        seen = real[:, None, None].to(weights.device)
        found.append(weights.gather(3, index).masked_fill(~seen, 0))
    return tuple(found)
