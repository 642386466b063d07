"""Reading prompts into the memory that a session decodes in; short ones as CUDA graphs."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mambactl.decode.gpu.head_pass import PackedHead
from mambactl.decode.gpu.state import ModelState, PackedModel
from mambactl.decode.head_drafter import HeadReading
from mambactl.decode.prefill import newest, pad, read_in_pieces
from mambactl.decode.shared_prefix import Prefixes
from mambactl.models.cache import HybridCache

# lengths that graphs are made for; a shorter prompt is padded, below twice its tokens
LENGTHS = (16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 640, 768, 896, 1024, 1280, 1536, 1792, 2048)
# tokens of all rows up to which launching kernels takes longer than running them
GRAPH_TOKENS = 4096


def graph_length(longest: int, batch: int, capacity: int) -> int | None:
    """Padded length for prompts of up to `longest` tokens; None if no graph pays or fits."""
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

    def __init__(
        self,
        weights: PackedModel,
        state: ModelState,
        batch: int,
        prefixes: Prefixes | None = None,
        pool: "torch.cuda._POOL_HANDLE | None" = None,
        along: tuple[PackedHead, ModelState] | None = None,
    ):
        """Let a draft head read `along`, into a state of its own."""
        self.along = along
        self.weights, self.state, self.batch = weights, state, batch
        self.prefixes, self.pool = prefixes, pool
        self.device = weights.table.device
        self.graphs: dict[int, _Graph] = {}
        self.met: set[int] = set()

    def read(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Read prompts, which may be empty; returns the stream [B, D] behind each last token.

        Rows beyond the prompts, and those of empty ones, are as before the first token.
        """
        rows = [*prompts, *[[]] * (self.batch - len(prompts))]
        length = None
        before = self.prefixes is not None and self.prefixes.before_graphs
        if self.device.type == "cuda" and not before:
            length = graph_length(max(map(len, rows)), self.batch, self.state.capacity)
        if length is None:
            # shared here alone: where there is a graph, it is faster than two passes
            prefix = None if self.prefixes is None else self.prefixes.of(prompts)
            return self._in_pieces(rows, prefix)
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

    def _in_pieces(self, rows: Sequence[Sequence[int]], prefix: HybridCache | None) -> Tensor:
        cache = self._cache(prefix)
        known = 0 if prefix is None else prefix.seen
        along = self._along()
        last = read_in_pieces(self.weights.source, cache, [row[known:] for row in rows], along)
        self._load(cache, along)
        return last

    def _along(self) -> HeadReading | None:
        """Reading of the draft head, which writes its keys where decoding reads them."""
        if self.along is None:
            return None
        head, state = self.along
        reading = HeadReading.start(head.source, self.batch)
        state.lend(reading.cache, head.body)
        return reading

    def _load(self, cache: HybridCache, along: HeadReading | None) -> None:
        """Take over what reading left in the caches."""
        self.state.load(cache, self.weights)
        if self.along is not None and along is not None:
            head, state = self.along
            state.load(along.cache, head.body)

    def _cache(self, prefix: HybridCache | None = None) -> HybridCache:
        """A cache that shares the memory of `state` where the two hold the same.

        It is empty, or holds what `prefix` does, once for every row.
        """
        if prefix is None:
            cache = HybridCache(self.weights.source.config, self.batch, self.device)
        else:
            cache = prefix.copies(self.batch)
        self.state.lend(cache, self.weights)
        for layer in cache.layers:
            layer.replace_tensors(Tensor.contiguous)
        return cache

    def _at_once(self, tokens: Tensor, n_new: Tensor) -> Tensor:
        """Read the first n_new [B] of tokens [B, L]."""
        cache = self._cache()
        cache.level = True
        along = self._along()
        stream = self.weights.source.read(tokens, cache, n_new)
        if along is not None:
            along(tokens, stream, n_new)
        self._load(cache, along)
        return newest(stream, n_new)

    def _capture(self, length: int) -> _Graph:
        tokens = torch.zeros(self.batch, length, dtype=torch.long, device=self.device)
        n_new = torch.zeros(self.batch, dtype=torch.long, device=self.device)
        graph = torch.cuda.CUDAGraph()
        # a thread's first product makes a handle, which a capture does not allow
        torch.cuda.current_blas_handle()
        # what is launched was compiled when the length came for the first time
        with torch.cuda.graph(graph, pool=self.pool):
            last = self._at_once(tokens, n_new)
        return _Graph(graph, tokens, n_new, last)
