"""Rows with padding and with several documents, as the mixers take them.

Mixers know no padding: its columns go to the end of their rows, which are ragged then (`n_new` in
`mambactl.kernels.reference`), and what comes out goes back to where it was.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mambactl.present import present


@dataclass(frozen=True)
class Ragged:
    """Numbers of real tokens by row, n_new [B], and their columns before padding [B, T].

    `real` [B, T] says which columns those are; all are None where every column is.
    """

    n_new: Tensor | None = None
    order: Tensor | None = None
    real: Tensor | None = None

    def sort(self, t: Tensor) -> Tensor:
        """Columns of t [B, T] or [B, T, D], real ones first."""
        return t if self.order is None else take(t, self.order)

    def restore(self, t: Tensor) -> Tensor:
        """Columns of t [B, T, ...] where they were before `sort`, those of padding 0."""
        if self.order is None:
            return t
        real = present(self.real)
        padding = ~real.view(*real.shape, *[1] * (t.ndim - 2)).to(t.device)
        return take(t, self.order.argsort(1).to(t.device)).masked_fill(padding, 0)


def take(t: Tensor, columns: Tensor) -> Tensor:
    """Columns [B, T'] of t [B, T, ...]."""
    index = columns.view(*columns.shape, *[1] * (t.ndim - 2))
    return t.gather(1, index.expand(*columns.shape, *t.shape[2:]))


def without_padding(attention_mask: Tensor | None, n_new: Tensor | None, length: int) -> Ragged:
    """Real columns among `length`: those with a 1 in a mask [B, T] or [B, past + T].

    ValueError for a mask with other dimensions.
    """
    if n_new is not None or attention_mask is None:
        return Ragged(n_new)
    if attention_mask.ndim != 2:
        raise ValueError("HybridModel takes a 2-D attention mask [B, T] of ones and zeros")
    mask = attention_mask[:, -length:].bool()
    # a program that is compiled as a whole cannot ask
    if not torch.compiler.is_compiling() and bool(mask.all()):
        return Ragged()
    order = (~mask).to(torch.uint8).argsort(dim=1, stable=True)  # [B, T]
    return Ragged(mask.sum(1), order, mask)


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


class AttentionMaps:
    """Weights of attention layers [B, H, T, columns] by column, as a caller knows them.

    Layers have them by key slot, and slots count the real tokens of a row; `columns` counts those
    of the cache too, some of which hold no token where `padded`. ValueError where padding is not
    known from a mask of all columns.
    """

    def __init__(
        self, rows: Ragged, attention_mask: Tensor | None, columns: int, padded: bool
    ) -> None:
        self.rows, self.found = rows, []
        self._real: Tensor | None = None
        if not padded and (attention_mask is None or bool(attention_mask.all())):
            return
        if attention_mask is None or attention_mask.shape[1] != columns:
            raise ValueError(
                f"output_attentions needs an attention_mask of all {columns} columns, those in "
                "the cache among them"
            )
        self._real = attention_mask.bool()
        self._slot = (self._real.cumsum(1) - 1).clamp(min=0)  # [B, columns]
        self._column = (~self._real).to(torch.uint8).argsort(dim=1, stable=True)  # [B, slots]

    def keep(self, weights: Tensor) -> Tensor:
        """Add one layer's weights [B, H, T, S] and return them.

        What is returned is made from what is kept, so that gradients pass through it.
        """
        slots = weights.shape[3]
        if self._real is None:
            self.found.append(weights)
            return weights
        real, slot, column = (t.to(weights.device) for t in (self._real, self._slot, self._column))
        by_query = self.rows.restore(weights.transpose(1, 2)).transpose(1, 2)
        by_column = _keys(by_query, slot.clamp(max=slots - 1))
        by_column = by_column.masked_fill(~real[:, None, None], 0)
        self.found.append(by_column)
        by_slot = _keys(by_column, column[:, :slots])
        return self.rows.sort(by_slot.transpose(1, 2)).transpose(1, 2)


def _keys(weights: Tensor, index: Tensor) -> Tensor:
    """Keys [B, S'] of weights [B, H, T, S]."""
    return weights.gather(3, index[:, None, None].expand(*weights.shape[:3], -1))
