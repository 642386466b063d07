"""Reading prompts into the memory that a session decodes in; short ones as CUDA graphs."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mambactl.decode.gpu.state import ModelState, PackedModel
from mambactl.decode.prefill import newest, pad
from mambactl.models.cache import HybridCache

# tokens of all rows that are read at once: they bound the memory of activations
CHUNK_TOKENS = 8192
# lengths that graphs are made for; a shorter prompt is padded, below twice its tokens
LENGTHS = (16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 640, 768, 896, 1024, 1280, 1536, 1792, 2048)
# tokens of all rows up to which launching kernels takes longer than running them
GRAPH_TOKENS = 4096


def graph_length(longest: int, batch: int, capacity: int) -> int | None:
    """What a graph pads prompts of up to `longest` tokens to; None where none pays or fits."""
    most = min(GRAPH_TOKENS // batch, capacity)
    return next((n for n in LENGTHS if longest <= n <= most), None)


@dataclass
class _Graph:
    """A captured reading of rows padded to one length."""

    graph: torch.cuda.CUDAGraph
    tokens: Tensor  # [B, L]
    n_new: Tensor  # [B]
    last: Tensor  # [B, D]


class Reader:
    """Reads the prompts of a batch through one model, into `state`.

    Keys and values that are kept for every token are written where decoding reads them. A length
    is captured when it comes for the second time.
    """

    def __init__(self, weights: PackedModel, state: ModelState, batch: int, pool: object):
        self.weights, self.state, self.batch, self.pool = weights, state, batch, pool
        self.device = weights.table.device
        self.graphs: dict[int, _Graph] = {}
        self.met: set[int] = set()

    def read(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Read prompts, which may be empty; returns the stream [B, D] behind each last token.

        Rows beyond the prompts, and those of empty ones, are as before the first token.
        """
        rows = [*prompts, *[[]] * (self.batch - len(prompts))]
        length = None
        if self.device.type == "cuda":
            length = graph_length(max(map(len, rows)), self.batch, self.state.capacity)
        if length is None:
            return self._in_chunks(rows)
        tokens, n_new = pad(rows, "cpu", least=length), torch.tensor([len(row) for row in rows])
        if length not in self.met:
            self.met.add(length)
            # padded too, so that a graph changes no bit
            return self._at_once(tokens.to(self.device), n_new.to(self.device))
        if length not in self.graphs:
            self.graphs[length] = self._capture(length)
        graph = self.graphs[length]
        graph.tokens.copy_(tokens)
        graph.n_new.copy_(n_new)
        graph.graph.replay()
        return graph.last

    def _in_chunks(self, rows: Sequence[Sequence[int]]) -> Tensor:
        cache = self._cache()
        tokens = pad(rows, self.device, least=1)  # [B, T]
        lengths = torch.tensor([len(row) for row in rows], device=self.device)  # [B]
        last = self._nothing()
        size = max(CHUNK_TOKENS // self.batch, LENGTHS[0])
        for start in range(0, tokens.shape[1], size):
            chunk = tokens[:, start : start + size]
            n_new = (lengths - start).clamp(0, chunk.shape[1])
            last = self._chunk(cache, chunk, n_new, last)
        self.state.load(cache, self.weights)
        return last

    def _chunk(self, cache: HybridCache, tokens: Tensor, n_new: Tensor, last: Tensor) -> Tensor:
        """Read the first n_new [B] of tokens [B, T]; `last` [B, D] is that of rows without any."""
        return newest(self.weights.source.read(tokens, cache, n_new), n_new, last)

    def _cache(self) -> HybridCache:
        """An empty cache that shares the memory of `state` where the two hold the same."""
        cache = HybridCache(self.weights.source.config, self.batch, self.device)
        cache.level = True
        self.state.lend(cache, self.weights)
        return cache

    def _at_once(self, tokens: Tensor, n_new: Tensor) -> Tensor:
        """Read the first n_new [B] of tokens [B, L]."""
        cache = self._cache()
        last = self._chunk(cache, tokens, n_new, self._nothing())
        self.state.load(cache, self.weights)
        return last

    def _nothing(self) -> Tensor:
        return self.weights.table.new_zeros(self.batch, self.weights.table.shape[1])

    def _capture(self, length: int) -> _Graph:
        tokens = torch.zeros(self.batch, length, dtype=torch.long, device=self.device)
        n_new = torch.zeros(self.batch, dtype=torch.long, device=self.device)
        graph = torch.cuda.CUDAGraph()
        # what it launches was compiled when the length came for the first time
        with torch.cuda.graph(graph, pool=self.pool):
            last = self._at_once(tokens, n_new)
        return _Graph(graph, tokens, n_new, last)
