"""Reading prompts into the memory that a session decodes in; short ones as CUDA graphs."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mambactl.decode.gpu.head_pass import PackedHead
from mambactl.decode.gpu.prompt_graphs import PromptGraphs, graph_length, graph_tokens
from mambactl.decode.gpu.state import ModelState, PackedModel
from mambactl.decode.head_drafter import HeadReading
from mambactl.decode.prefill import newest, read_in_pieces
from mambactl.decode.shared_prefix import Prefixes
from mambactl.models.cache import HybridCache


class Reader:
    """Reads the prompts of a batch through one model, into `state`.

    Keys and values that are kept for every token are written where decoding reads them.
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
        self.prefixes = prefixes
        self.device = weights.table.device
        self.most = graph_tokens(weights.table.shape[1])
        self.graphs = PromptGraphs(self._at_once, self.device, pool)

    def read(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Read prompts, which may be empty; returns the stream [B, D] behind each last token.

        Rows beyond the prompts, and those of empty ones, are as before the first token.
        """
        rows = [*prompts, *[[]] * (self.batch - len(prompts))]
        length = None
        before = self.prefixes is not None and self.prefixes.before_graphs
        if self.device.type == "cuda" and not before:
            longest = max(map(len, rows))
            length = graph_length(longest, self.batch, self.state.capacity, self.most)
        if length is None:
            # shared here alone: where there is a graph, it is faster than two passes
            prefix = None if self.prefixes is None else self.prefixes.of(prompts)
            return self._in_pieces(rows, prefix)
        return self.graphs.read(rows, length)[0]

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
