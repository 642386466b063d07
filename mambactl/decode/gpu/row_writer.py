"""Writing of prompts that were read into rows of a state, as a CUDA graph where they come again."""

from dataclasses import dataclass
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor

from mambactl.decode.gpu.capture import captured, overwrite, sent
from mambactl.decode.gpu.state import ModelState, PackedModel
from mambactl.models.cache import HybridCache
from mambactl.models.loan import Replayed


@dataclass
class _Write:
    """A captured copy of a graph's cache to `rows` [B] of the state."""

    graph: torch.cuda.CUDAGraph
    rows: Tensor


class RowWriter:
    """Writes caches of prompts into the state of a batch.

    A cache takes hundreds of small copies. One that a graph lends lies in the same memory each
    time, so from its second time on its copies are a graph too.
    """

    def __init__(self, state: ModelState, weights: PackedModel):
        self.state, self.weights, self.device = state, weights, weights.table.device
        # the first time only what is launched is made ready, which no capture can hold
        self._met: WeakSet[Replayed] = WeakSet()
        self._writes: WeakKeyDictionary[Replayed, _Write] = WeakKeyDictionary()
        self._pool = torch.cuda.graph_pool_handle() if self.device.type == "cuda" else None

    def write(self, cache: HybridCache, first: int) -> None:
        """Copy all rows of a cache, which stays as it is, to the rows from `first` on.

        RuntimeError where the cache was lent and has been overwritten.
        """
        count = len(cache.lengths)
        rows = torch.arange(first, first + count)
        if cache.loan is None:
            self._copy(cache, sent(rows, self.device))
            return
        cache.loan.check()
        graph = cache.loan.graph
        if graph not in self._met:
            self._met.add(graph)
            self._copy(cache, sent(rows, self.device))
            return
        write = self._writes.get(graph)
        if write is None:
            write = self._writes[graph] = self._capture(cache)
        overwrite(write.rows, rows)
        write.graph.replay()

    def _capture(self, cache: HybridCache) -> _Write:
        rows = torch.zeros(len(cache.lengths), dtype=torch.long, device=self.device)
        graph, _ = captured(lambda: self._copy(cache, rows), self.device, self._pool)
        return _Write(graph, rows)

    def _copy(self, cache: HybridCache, rows: Tensor) -> None:
        self.state.load(cache, self.weights, rows)
