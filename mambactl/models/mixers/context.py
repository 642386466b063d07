"""Everything that one forward call of the model passes to every mixer."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from mambactl.kernels.local_attention import LocalKeys, LocalSpan
from mambactl.kernels.spans import Spans
from mambactl.models.cache import MAX_SEQUENTIAL, Cursor


@dataclass(frozen=True)
class StepContext:
    """Positions [B, T], rotary (cos, sin), and which keys attention sees.

    Those are in `mask` [B, 1, T, S] or in `spans`; where both are None, all of the past. A window
    beside a recurrence sees `local`. All is made once per call of the model, for every layer.
    `seq_idx` [B, T] separates packed documents, `n_new` [B] makes rows ragged, `slots` is the
    number of key slots attention may read, `cursor` is None without a cache.
    """

    positions: Tensor
    rotary: tuple[Tensor, Tensor] | None
    mask: Tensor | None
    seq_idx: Tensor | None = None
    n_new: Tensor | None = None
    slots: int = 0
    cursor: Cursor | None = None
    first: bool = False
    spans: Spans | None = None
    local: Mapping[LocalSpan, LocalKeys] | None = None

    @property
    def sequential(self) -> bool:
        """Whether recurrent layers go token by token, on the route that rolls back exactly."""
        return goes_sequentially(self.positions.shape[1], self.cursor, self.first)


def goes_sequentially(length: int, cursor: Cursor | None, first: bool) -> bool:
    """One token always; several only where a rollback may follow. Prompts go in chunks."""
    if cursor is None:
        return False
    return length == 1 or (cursor.recording and not first and length <= MAX_SEQUENTIAL)
