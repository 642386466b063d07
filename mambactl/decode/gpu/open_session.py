"""Device memory of sequences that come and go, and steps over as many as there are.

A sequence is a row of every tensor: starting one writes its row, and when one ends the last row
moves to the gap, so that a step runs over the first rows alone. On a GPU a step is a graph, one for
every power of two of rows, and rows without a sequence are idle.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product

import torch
from torch import Tensor

from mambactl.decode.gpu.capture import overwrite
from mambactl.decode.gpu.head_pass import HeadPass, PackedHead
from mambactl.decode.gpu.row_writer import RowWriter
from mambactl.decode.gpu.state import ModelState, PackedModel, make_state
from mambactl.decode.gpu.step import DEPTH, Batch, Guide, Pass, Step
from mambactl.decode.open_batch import LikelyTable, RowRequest
from mambactl.decode.prefill import pad
from mambactl.decode.prompt_reading import ReadRows
from mambactl.decode.sampler import SamplingParams
from mambactl.kernels.decode.operations import DecodeOps
from mambactl.kernels.decode.reference.verdict import Field
from mambactl.kernels.random import keys_under
from mambactl.models.cache import HybridCache
from mambactl.models.session_size import SessionSize
from mambactl.present import present

# of a row that is greedy among others that are drawn
MOST_LIKELY = (1.0, 1.0, 1.0)


@dataclass(frozen=True)
class Sent:
    """A step under way over the first `rows` rows; its event tells when its letters are there."""

    number: int
    rows: int
    k: int
    event: torch.cuda.Event | None
    likely: LikelyTable | None = None


class _Model:
    """Weights and the state of all rows."""

    def __init__(self, weights: PackedModel, ops: DecodeOps, size: SessionSize, longest: int):
        self.weights, self.ops, self.size = weights, ops, size
        whole = size.state_size(weights.stores_every_step)
        fewer = [] if ops.on_host else _counts(size.batch)
        self.state = make_state(weights, ops, whole, longest, fewer)
        self.writer = RowWriter(self.state, weights)

    def first(self, rows: int) -> ModelState:
        """State of the first `rows` rows, in the same memory."""
        size = SessionSize(rows, self.size.capacity, self.size.k)
        splits = size.state_size(self.weights.stores_every_step).splits
        return self.state.rows(slice(rows), splits)

    def limit(self, rows: int) -> int:
        """Number of ring slots in use in a step over `rows` rows; 0 on the host."""
        size = SessionSize(rows, self.size.capacity, self.size.k)
        return 0 if self.ops.on_host else size.ring_limit(self.weights.stores_every_step)

    def put(self, first: int, count: int, cache: HybridCache) -> None:
        """Copy the first `count` rows of a cache, which stays as it is, to those from `first` on.

        A cache with more rows writes to free ones behind them too.
        """
        if first + len(cache.lengths) > self.size.batch:
            cache = cache.select(torch.arange(count, device=cache.lengths.device))
        self.writer.write(cache, first)

    def move(self, source: int, target: int) -> None:
        """Copy the state of row `source` to row `target`."""
        for tensor in self.state.tensors():
            tensor[target].copy_(tensor[source])


class OpenSession:
    """Runs steps over the first rows of a batch; see the module."""

    def __init__(
        self,
        target: PackedModel,
        draft: PackedModel | PackedHead | str | None,
        ops: DecodeOps,
        size: SessionSize,
        eos: Sequence[int],
    ):
        self.size, self.ops, self.k = size, ops, size.k
        self.device = target.table.device
        self.batch = Batch(size.batch, size.capacity, size.k, self.device)
        self.batch.eos[: len(eos)] = torch.tensor(eos, dtype=torch.int32)
        self.target = _Model(target, ops, size, size.k + 1)
        self.draft = draft
        self.drafter: _Model | None = None
        self.guide: HeadPass | None = None
        if isinstance(draft, PackedModel):
            self.drafter = _Model(draft, ops, size, 2)
        elif isinstance(draft, PackedHead):
            self.drafter = _Model(draft.body, ops, size, size.k + 1)
            self.guide = HeadPass.of(draft, self.drafter.state, ops, size)
        self.steps: dict[int, Step] = {}
        self.graphs: dict[tuple[int, bool], torch.cuda.CUDAGraph] = {}
        self.number = 0

    @property
    def on_host(self) -> bool:
        """True if a step is over when it has been launched."""
        return self.device.type != "cuda"

    @cached_property
    def counts(self) -> list[int]:
        """Numbers of rows that there are graphs for, the largest first."""
        return [self.size.batch, *_counts(self.size.batch)]

    def prepare(self) -> None:
        """Compile and capture every step, as long as no row is active."""
        if self.on_host:
            for sampled in (False, True):
                self._step(self.size.batch).run(self.k, sampled)
            return
        self._compile()
        # a thread's first use of cuBLAS makes its handle, which no capture can hold
        torch.cuda.current_blas_handle()
        pool = torch.cuda.graph_pool_handle()
        for rows in self.counts:
            step = self._step(rows)
            for sampled in (False, True):
                step.run(self.k, sampled)
                step.begin(self.target.state.scratch.hidden[:rows], sampled)
                torch.cuda.synchronize(self.device)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=pool):
                    step.run(self.k, sampled)
                self.graphs[rows, sampled] = graph
        torch.cuda.synchronize(self.device)

    def _compile(self) -> None:
        from mambactl.kernels.compiling import compiled_together

        # what all share is made by the largest, which comes first
        with compiled_together():
            for rows, sampled in product(self.counts, (False, True)):
                step = self._step(rows)
                step.run(self.k, sampled)
                step.begin(self.target.state.scratch.hidden[:rows], sampled)
        torch.cuda.synchronize(self.device)

    def put(self, first: int, read: ReadRows, requests: Sequence[RowRequest]) -> None:
        """Write rows that have read their prompts, from `first` on; `begin` makes them active."""
        count = len(requests)
        self.target.put(first, count, read.target)
        if self.drafter is not None:
            self.drafter.put(first, count, present(read.draft))
        b, rows = self.batch, slice(first, first + count)
        params = [request.params for request in requests]
        lengths = map(len, read.prompts)
        columns = [self._progress(n, own) for n, own in zip(lengths, params, strict=True)]
        history = pad(read.prompts, "cpu")
        settings = [
            MOST_LIKELY if own.greedy else (own.temperature, float(own.top_k), own.top_p)
            for own in params
        ]
        keys = keys_under(0, [own.seed for own in params], [request.key for request in requests])
        self._write(b.progress[:, rows].T, columns, torch.int32)
        self._write(b.history[rows, : history.shape[1]], history, torch.int32)
        self._write(b.feed[rows, 1], [prompt[-1] for prompt in read.prompts], torch.int32)
        self._write(b.keys[rows], keys, torch.long)
        self._write(b.settings[rows], settings, torch.float32)

    def _progress(self, length: int, params: SamplingParams) -> list[int]:
        """Column of `progress` for a row that has read `length` tokens."""
        fields = {
            Field.LENGTH: length - 1,
            Field.BASE: length,
            Field.NEXT: length,
            Field.DRAFT_BASE: length - 1,
            Field.DRAFT_NEXT: length - 1,
            Field.BUDGET: params.max_new_tokens,
            Field.STEP: self.number,
        }
        return [fields.get(field, 0) for field in Field]

    def begin(self, first: int, hidden: Tensor, sampled: bool, likely: bool) -> Sent:
        """Write the first tokens of the last rows, by the streams [N, D] behind their prompts."""
        new = slice(first, first + len(hidden))
        rows = self._rows(new.stop)
        step, active = self._step(rows), self.batch.progress[Field.ACTIVE, :rows]
        others = active.clone()
        active.zero_()
        active[new] = 1
        streams = hidden.new_zeros(rows, hidden.shape[1])
        streams[new] = hidden
        step.begin(streams, sampled)
        active += others
        return self._sent(rows, 0, likely)

    def launch(self, rows: int, sampled: bool, likely: bool) -> Sent:
        """Start a step over the first rows."""
        rows = self._rows(rows)
        if self.on_host:
            self._step(rows).run(self.k, sampled)
        else:
            self.graphs[rows, sampled].replay()
        return self._sent(rows, self.k, likely)

    def letters(self, sent: Sent) -> list[list[int]]:
        """Results of a step that has arrived, by row."""
        return self.batch.pinned[sent.number % DEPTH, : sent.rows].tolist()

    def stop(self, row: int) -> None:
        """Deactivate a row: no later step writes to it."""
        self.batch.progress[Field.ACTIVE, row] = 0

    def move(self, source: int, target: int) -> None:
        """Copy row `source` with its state to row `target`."""
        for model in (self.target, self.drafter):
            if model is not None:
                model.move(source, target)
        b = self.batch
        b.progress[:, target] = b.progress[:, source]
        own = [] if self.guide is None else self.guide.memory
        for tensor in (b.feed, b.history, b.keys, b.settings, *own):
            tensor[target].copy_(tensor[source])

    def _rows(self, rows: int) -> int:
        """Number of rows of the smallest step that holds `rows` rows."""
        return rows if self.ops.on_host else min(each for each in self.counts if each >= rows)

    def _step(self, rows: int) -> Step:
        if rows not in self.steps:
            whole = self.steps.get(self.size.batch)
            batch = self.batch.first(rows)
            target = Pass(self.target.weights, self.target.first(rows), self.ops)
            drafter: Pass | Guide | str | None = self.draft if isinstance(self.draft, str) else None
            draft_limit = 0
            if self.drafter is not None and self.guide is not None:
                drafter = self.guide.first(rows, self.drafter.first(rows))
            elif self.drafter is not None:
                drafter = Pass(self.drafter.weights, self.drafter.first(rows), self.ops)
                draft_limit = self.drafter.limit(rows)
            self.steps[rows] = Step(
                batch,
                target,
                drafter,
                self.ops,
                limit=self.target.limit(rows),
                draft_limit=draft_limit,
                distributions=whole and whole.distributions,
            )
        return self.steps[rows]

    def _sent(self, rows: int, k: int, likely: bool) -> Sent:
        table = self._likely(rows, k) if likely else None
        event = None
        if not self.on_host:
            event = torch.cuda.Event()
            event.record()
        sent = Sent(self.number, rows, k, event, table)
        self.number += 1
        return sent

    def _likely(self, rows: int, k: int) -> LikelyTable:
        """Log-probabilities of the tokens of the step just run, as far as they were accepted."""
        b, step = self.batch.first(rows), self._step(rows)
        if self.ops.on_host:
            # a pass there is as wide as what was drafted
            k = step.width
        logits = step.distributions["target"].logits[: rows * (k + 1)].view(rows, k + 1, -1)
        tokens = torch.cat([b.feed[:, 2 : 2 + k], b.following[:, None]], 1)
        tokens.scatter_(1, b.accepted[:, None].clamp(0, k).long(), b.following[:, None])
        return LikelyTable.of(logits, tokens).on_host()

    def _write(self, tensor: Tensor, values: Sequence[object] | Tensor, dtype: torch.dtype) -> None:
        overwrite(tensor, torch.as_tensor(values, dtype=dtype))


def _counts(most: int) -> list[int]:
    """Powers of two below `most`, the largest first."""
    return [1 << n for n in range(most.bit_length() - 1, -1, -1) if 1 << n < most]
