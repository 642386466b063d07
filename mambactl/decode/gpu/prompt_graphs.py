"""Reading of whole prompts as CUDA graphs, of which there is one for each padded shape."""

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from mambactl.decode.gpu.capture import captured, overwrite, sent
from mambactl.decode.prefill import CHUNK_TOKENS, CHUNK_WIDTH, newest, pad
from mambactl.models.cache import HybridCache
from mambactl.models.hybrid import HybridModel
from mambactl.models.loan import Loan

# lengths that graphs are made for; a shorter prompt is padded, below twice its tokens
LENGTHS = (16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 640, 768, 896, 1024, 1280, 1536, 1792, 2048)
# tokens of all rows up to which a model of `CHUNK_WIDTH` takes longer to launch than to run
GRAPH_TOKENS = 4096
# graphs that `WholePrompts` keeps, each with the cache that it writes
MOST_KEPT = 24

Result = TypeVar("Result")


def graph_tokens(width: int) -> int:
    """Most tokens of all rows that a graph reads with a model of `width` on a GPU."""
    # of a narrow model a token costs less, by the square of the width; memory bounds them too
    narrow = max(CHUNK_WIDTH / width, 1.0)
    return int(min(GRAPH_TOKENS * narrow**2, CHUNK_TOKENS * narrow))


def graph_length(longest: int, batch: int, capacity: int, most: int = GRAPH_TOKENS) -> int | None:
    """Padded length for prompts of up to `longest` tokens; None if no graph pays or fits.

    `most` are the tokens of all rows that may be read at once.
    """
    each = min(most // batch, capacity)
    return next((n for n in LENGTHS if longest <= n <= each), None)


@dataclass(eq=False)
class _Graph(Generic[Result]):
    """A captured reading of rows padded to one length, and what it writes."""

    graph: torch.cuda.CUDAGraph
    tokens: Tensor  # [B, L]
    n_new: Tensor  # [B]
    result: Result
    runs: int = 0

    def run(self, tokens: Tensor, n_new: Tensor) -> Loan:
        overwrite(self.tokens, tokens)
        overwrite(self.n_new, n_new)
        self.graph.replay()
        self.runs += 1
        return Loan(self, self.runs)


class PromptGraphs(Generic[Result]):
    """Readings of prompts, each captured when its shape comes for the second time.

    `read` takes padded tokens [B, L] and how many of each row are new [B]. What a graph returns is
    lent: it is overwritten when the graph runs again.
    """

    def __init__(
        self,
        read: Callable[[Tensor, Tensor], Result],
        device: torch.device,
        pool: "torch.cuda._POOL_HANDLE | None" = None,
        most: int | None = None,
    ):
        """Keep `most` graphs, those that were used last; None keeps all."""
        self._read, self.device, self.most, self._pool = read, device, most, pool
        self.graphs: dict[tuple[int, int], _Graph[Result]] = {}
        self.met: set[tuple[int, int]] = set()

    def read(self, rows: Sequence[Sequence[int]], length: int) -> tuple[Result, Loan | None]:
        """Read rows of tokens, which may be empty, padded to `length`.

        Returns the loan of the result; None where the memory is the result's own.
        """
        shape = len(rows), length
        tokens, n_new = pad(rows, "cpu", least=length), torch.tensor([len(row) for row in rows])
        if shape not in self.met:
            self.met.add(shape)
            # padded too, so that a graph changes no bit
            return self._read(sent(tokens, self.device), sent(n_new, self.device)), None
        graph = self.graphs.pop(shape, None) or self._capture(*shape)
        # the one used last is the last one
        self.graphs[shape] = graph
        if self.most is not None and len(self.graphs) > self.most:
            self.graphs.pop(next(iter(self.graphs)))
        return graph.result, graph.run(tokens, n_new)

    def _capture(self, rows: int, length: int) -> _Graph[Result]:
        tokens = torch.zeros(rows, length, dtype=torch.long, device=self.device)
        n_new = torch.zeros(rows, dtype=torch.long, device=self.device)
        # what is launched was compiled when the shape came for the first time
        graph, result = captured(lambda: self._read(tokens, n_new), self.device, self._pool)
        return _Graph(graph, tokens, n_new, result)


class WholePrompts:
    """Prompts read at once from their first tokens on, into a cache of their own."""

    def __init__(self, model: HybridModel, rows: int):
        """Read up to `rows` prompts at once."""
        self.model, self.rows = model, rows
        self.most = graph_tokens(model.config.hidden_size)
        self.graphs = PromptGraphs(self._read, model.device, most=MOST_KEPT)

    def prepare(self, longest: int) -> None:
        """Capture the graphs of single prompts of up to `longest` tokens."""
        for length in LENGTHS:
            if length <= min(longest, self.most):
                for _ in range(2):
                    self.read([[0] * length], length)

    def length(self, prompts: Sequence[Sequence[int]], most: int) -> int | None:
        """Padded length for these prompts; None if no graph pays or fits.

        `most` are the tokens of all of them that may be read at once.
        """
        longest, most = max(map(len, prompts)), min(self.most, most)
        return graph_length(longest, self._rows(prompts), LENGTHS[-1], most)

    def read(self, prompts: Sequence[Sequence[int]], length: int) -> tuple[HybridCache, Tensor]:
        """Read prompts, which may be empty, padded to `length`.

        Returns their cache, which the next prompts may overwrite if it has a `loan` and which may
        have more rows then, and the stream [B, D] behind each last token, 0 for empty prompts.
        """
        count = len(prompts)
        idle = self._rows(prompts) - count
        (cache, last), loan = self.graphs.read([*prompts, *[[]] * idle], length)
        if loan is None and idle:
            cache = cache.select(torch.arange(count, device=last.device))
        elif loan is not None:
            cache = copy(cache)
            cache.loan = loan
        return cache, last[:count].clone()

    def _rows(self, prompts: Sequence[Sequence[int]]) -> int:
        # few numbers of rows, so that graphs come again
        return min(1 << (len(prompts) - 1).bit_length(), max(self.rows, len(prompts)))

    def _read(self, tokens: Tensor, n_new: Tensor) -> tuple[HybridCache, Tensor]:
        cache = HybridCache(self.model.config, len(tokens), self.model.device)
        cache.level = True
        stream = self.model.read(tokens, cache, n_new)
        cache.level = False
        return cache, newest(stream, n_new)
