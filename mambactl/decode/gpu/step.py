"""One decode step on the device: draft, verify, accept, commit, with no question to the host."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mambactl.decode.copying import MATCH, MATCH_ALONE
from mambactl.decode.gpu.state import LayerWeights, ModelState, PackedModel
from mambactl.decode.sampler import SamplingParams
from mambactl.kernels.decode.operations import DecodeOps
from mambactl.kernels.decode.reference.linear import read_plainly
from mambactl.kernels.decode.reference.verdict import Field, Letter
from mambactl.kernels.random import Stream, as_int64
from mambactl.models.packed import LayerState, PassContext, Residual, Segment
from mambactl.present import present

# mailbox slots; the host may be this many steps behind
DEPTH = 8
MOST_EOS = 64


class Batch:
    """Buffers for `size` sequences of up to `capacity` tokens and at most `k` drafts a step.

    The step's kernels read and write these; the host fills them at the start and then only reads
    `pinned`, the mailbox's copy.
    """

    def __init__(self, size: int, capacity: int, k: int, device: torch.device):
        def integers(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        self.size, self.capacity, self.k = size, capacity, k
        self.progress = integers(len(Field), size)
        self.feed = integers(size, 2 + k)
        self.history = integers(size, capacity)
        self.best = integers(size * (k + 1))
        self.accepted, self.following, self.drafted = integers(size), integers(size), integers(size)
        self.present = integers(size)
        self.eos = torch.full((MOST_EOS,), -1, dtype=torch.int32, device=device)
        self.mailbox = integers(DEPTH, size, len(Letter) + k + 1)
        self.pinned = torch.zeros(
            self.mailbox.shape, dtype=torch.int32, pin_memory=device.type == "cuda"
        )
        self.keys = torch.zeros(size, dtype=torch.long, device=device)
        self.seed = torch.zeros(1, dtype=torch.long, device=device)
        self.settings = torch.ones(size, 3, device=device)
        # of all sequences, whichever a step runs over
        self.outbox = self.mailbox

    def first(self, rows: int) -> "Batch":
        """The first `rows` sequences, in the same memory."""
        part = copy(self)
        part.size = rows
        part.progress, part.mailbox = self.progress[:, :rows], self.mailbox[:, :rows]
        part.feed, part.history = self.feed[:rows], self.history[:rows]
        part.accepted, part.following = self.accepted[:rows], self.following[:rows]
        part.drafted, part.present = self.drafted[:rows], self.present[:rows]
        part.keys, part.settings = self.keys[:rows], self.settings[:rows]
        return part

    def field(self, field: Field) -> Tensor:
        """One row [B] of `progress`."""
        return self.progress[field]

    def start(
        self, prompts: Sequence[Sequence[int]], keys: Sequence[int], params: SamplingParams
    ) -> None:
        """Begin before the first new tokens, where a commit of one token each follows.

        States are then those behind whole prompts, and a draft's those before their last token.
        """
        rows = len(prompts)
        progress = torch.zeros(len(Field), self.size, dtype=torch.int32)
        history = torch.zeros(self.size, self.capacity, dtype=torch.int32)
        feed = torch.zeros(self.size, self.feed.shape[1], dtype=torch.int32)
        for row, prompt in enumerate(prompts):
            history[row, : len(prompt)] = torch.tensor(prompt, dtype=torch.int32)
            feed[row, 1] = prompt[-1]
            progress[Field.LENGTH, row] = len(prompt) - 1
            progress[Field.BASE, row] = progress[Field.NEXT, row] = len(prompt)
            progress[Field.DRAFT_BASE, row] = progress[Field.DRAFT_NEXT, row] = len(prompt) - 1
        progress[Field.ACTIVE, :rows] = 1
        progress[Field.BUDGET, :rows] = params.max_new_tokens
        self.progress.copy_(progress)
        self.history.copy_(history)
        self.feed.copy_(feed)
        eos = torch.full((MOST_EOS,), -1, dtype=torch.int32)
        eos[: len(params.eos_token_ids)] = torch.tensor(params.eos_token_ids, dtype=torch.int32)
        self.eos.copy_(eos)
        names = torch.zeros(self.size, dtype=torch.long)
        names[:rows] = torch.tensor(list(keys), dtype=torch.long)
        self.keys.copy_(names)
        self.seed.fill_(as_int64(params.seed))
        self.settings.copy_(torch.tensor([params.temperature, params.top_k, params.top_p]))


class Pass:
    """Runs segments through one model with one set of operations."""

    def __init__(self, weights: PackedModel, state: ModelState, ops: DecodeOps):
        self.weights, self.state, self.ops = weights, state, ops
        scratch = state.scratch
        self.context = PassContext(
            ops, weights.eps, weights.rotations, scratch.partial, scratch.counter
        )

    def run(self, tokens: Tensor, segment: Segment) -> Residual:
        """Run tokens int32 [B, T]; the stream after the last layer, scaled by the final norm."""
        w, s = self.weights, self._stream(segment.rows)
        self._start(tokens, w.table, w.layers[0].gain if w.layers else w.gain, s, w.factor)
        return self._through(s, segment)

    def run_on(self, hidden: Tensor, segment: Segment) -> Residual:
        """Run the layers over a stream [M, D] of the model's own in place of embeddings."""
        w, s = self.weights, self._stream(segment.rows)
        self._start(_every_row(hidden), hidden, w.layers[0].gain, s, w.entrance)
        return self._through(s, segment)

    def _through(self, s: Residual, segment: Segment) -> Residual:
        w = self.weights
        gains = [layer.gain for layer in w.layers[1:]] + [w.gain]
        for layer, held, gain in zip(w.layers, self.state.layers, gains, strict=True):
            self._layer(layer, held, gain, s, segment)
        return s

    def enter(self, hidden: Tensor) -> Residual:
        """The stream of hidden [B, D], scaled by the final norm."""
        s = self._stream(len(hidden))
        self._start(_every_row(hidden), hidden, self.weights.gain, s, self.weights.entrance)
        return s

    def _start(
        self, tokens: Tensor, table: Tensor, gain: Tensor | None, s: Residual, factor: float
    ) -> None:
        """Rows of a table into the stream, which a norm of weight `gain` reads, or none."""
        written = self.weights.gain if gain is None else gain
        self.ops.embed(tokens, table, written, s.hidden, s.scaled, s.squares, factor)
        if gain is None:
            read_plainly(s.hidden, s.scaled, s.squares, self.weights.eps)

    def _stream(self, rows: int) -> Residual:
        held = self.state.scratch
        pieces = self.ops.square_pieces(rows, held.hidden.shape[1])
        return Residual(
            held.hidden[:rows],
            held.scaled[:rows],
            held.squares[: rows * pieces].view(rows, pieces),
            held.wide,
            held.mixed,
            held.inner,
        )

    def _layer(
        self,
        layer: LayerWeights,
        held: LayerState,
        gain: Tensor | None,
        s: Residual,
        segment: Segment,
    ) -> None:
        """One block; `gain` is of the norm that reads its output, None where there is none."""
        after = gain if layer.down is None else layer.mlp_gain
        with self._adding(layer, 0, after, s) as (stream, weight):
            layer.mixer.run(self.context, held, stream, segment, weight)
        if layer.down is None:
            return
        act = s.inner[: segment.rows * layer.down.shape[1]].view(segment.rows, -1)
        self.ops.swiglu(s.scaled, s.squares, self.weights.eps, present(layer.gate_up), act)
        with self._adding(layer, 1, gain, s) as (stream, weight):
            self.ops.add_residual(
                act, layer.down, None, stream.hidden, weight, stream.scaled, stream.squares
            )

    @contextmanager
    def _adding(
        self, layer: LayerWeights, part: int, gain: Tensor | None, s: Residual
    ) -> Iterator[tuple[Residual, Tensor]]:
        """The stream that a mixer (part 0) or an MLP (1) adds to, and the norm weight that it
        writes it for: a stream of its own where a norm follows, which is then added.
        """
        if not layer.behind:
            yield s, present(gain)
            return
        branch = replace(s, hidden=present(self.state.scratch.branch)[: len(s.hidden)])
        branch.hidden.zero_()
        yield branch, layer.behind[part]
        self.ops.add_normed(
            s.scaled, s.squares, self.weights.eps, s.hidden, gain, s.scaled, s.squares
        )

    def best(self, s: Residual, T: int, last: bool, tokens: Tensor, scratch: "HeadScratch") -> None:
        """The argmax of every row, or only of each sequence's last one, into tokens."""
        scaled, squares = self._rows(s, T, last)
        rows = len(scaled)
        pieces = self.ops.best_pieces(rows, len(self.weights.head))
        best = scratch.best[: rows * pieces].view(rows, pieces)
        index = scratch.index[: rows * pieces].view(rows, pieces)
        self.ops.head_best(scaled, squares, self.weights.eps, self.weights.head, best, index)
        self.ops.pick(best, index, tokens)

    def logits(self, s: Residual, T: int, last: bool, logits: Tensor) -> None:
        """Logits [M or B, V] of every row, or only of each sequence's last one."""
        scaled, squares = self._rows(s, T, last)
        self.ops.head_logits(scaled, squares, self.weights.eps, self.weights.head, logits)

    @staticmethod
    def _rows(s: Residual, T: int, last: bool) -> tuple[Tensor, Tensor]:
        step = slice(T - 1, None, T) if last else slice(None)
        return s.scaled[step], s.squares[step]


def _every_row(table: Tensor) -> Tensor:
    """Numbers of all rows of a table [M, D], int32 [M, 1]."""
    return torch.arange(len(table), dtype=torch.int32, device=table.device)[:, None]


@dataclass
class HeadScratch:
    """Pieces of the vocabulary's best tokens, flat."""

    best: Tensor
    index: Tensor


def head_scratch(
    ops: DecodeOps, vocabulary: int, rows: list[int], device: torch.device
) -> HeadScratch:
    """Room for the pieces of passes with any of these numbers of rows."""
    size = max(ops.best_pieces(m, vocabulary) * m for m in rows)
    return HeadScratch(
        torch.zeros(size, device=device), torch.zeros(size, dtype=torch.int32, device=device)
    )


@dataclass
class Distribution:
    """Logits [.., V] with what filtering found, for sampled decoding."""

    logits: Tensor
    threshold: Tensor
    log_mass: Tensor


def draw_draft(ops: DecodeOps, b: Batch, one: Distribution, i: int) -> None:
    """Draw draft i of every sequence from logits that are written."""
    ops.filter_rows(one.logits, b.settings, one.threshold, one.log_mass)
    ops.draw_rows(
        one.logits, b.settings, one.threshold, one.log_mass, b.keys, b.field(Field.WRITTEN),
        b.seed, int(Stream.PROPOSE), tokens=b.feed[:, 2 + i], offset=i,
    )  # fmt: skip


class Guide(ABC):
    """A draft that reads the target's stream, and what it remembers of the last step."""

    @property
    @abstractmethod
    def memory(self) -> list[Tensor]:
        """Tensors that outlive a step; a sequence is a row of each."""

    @abstractmethod
    def remember(self, stream: Residual, b: Batch, k: int) -> None:
        """Take note of the target's stream behind [pending, k drafts], before they are committed.

        Sequences that are not active keep what they have.
        """

    @abstractmethod
    def draft(self, b: Batch, k: int, sampled: bool, drafted: "list[Distribution]") -> None:
        """Write k drafts into the feed, with the distributions that they were drawn from."""

    @abstractmethod
    def follow(self, b: Batch) -> None:
        """Read what was accepted, and draft nothing."""


class Step:
    """The kernels of a step for one batch.

    `draft` is a second model, a guide, "ngram" or None.
    """

    def __init__(
        self,
        batch: Batch,
        target: Pass,
        draft: Pass | Guide | str | None,
        ops: DecodeOps,
        *,
        limit: int,
        draft_limit: int,
        distributions: "dict[str, Distribution] | None" = None,
    ):
        """Share `distributions` with a step over more sequences, which never runs at once."""
        self.batch, self.target, self.draft, self.ops = batch, target, draft, ops
        self.limits = {"span": batch.k + 1, "limit": limit, "draft_limit": draft_limit}
        self.target_head = self._head(target, [batch.size * n for n in range(1, batch.k + 2)])
        self.draft_head = self._head(draft, [batch.size]) if isinstance(draft, Pass) else None
        self.distributions = {} if distributions is None else distributions
        # drafts per sequence of the last step that ran outside a graph
        self.width = 0

    @property
    def memory(self) -> list[Tensor]:
        """Tensors of the batch, and of a draft beside its state, that a step changes."""
        b = self.batch
        own = self.draft.memory if isinstance(self.draft, Guide) else []
        return [b.progress, b.feed, b.history, b.mailbox, *own]

    def _head(self, model: Pass, rows: list[int]) -> HeadScratch:
        head = model.weights.head
        return head_scratch(self.ops, len(head), rows, head.device)

    def run(self, k: int, sampled: bool, copied: bool = False) -> None:
        """One step with k drafts per sequence, `copied` from its text beside another draft."""
        b = self.batch
        drafted = None
        if k and (copied or isinstance(self.draft, str)):
            drafted = b.drafted
            k = self._copy(k, MATCH if copied else MATCH_ALONE, drafted)
            if copied:
                self._follow(k)
        elif k and isinstance(self.draft, Pass):
            self._draft(self.draft, k, sampled)
        elif k and isinstance(self.draft, Guide):
            self.draft.draft(b, k, sampled, [self._drafted(i) for i in range(k * sampled)])
        segment = Segment(
            b.field(Field.LENGTH), b.field(Field.ACTIVE), b.field(Field.BASE), b.field(Field.NEXT),
            T=k + 1,
        )  # fmt: skip
        self._conclude(self.target.run(b.feed[:, 1 : 2 + k], segment), k, sampled, drafted)

    def _copy(self, k: int, longest: int, drafted: Tensor) -> int:
        """Write up to k tokens of its text behind each sequence; the number a pass has to hold."""
        b = self.batch
        torch.add(b.field(Field.LENGTH), 1, out=b.present)
        self.ops.draft_ngram(b.history, b.present, b.feed[:, 2:], k, drafted, longest=longest)
        if not self.ops.on_host:
            return k
        # a pass is as wide as what was found
        return int(drafted.mul_(b.field(Field.ACTIVE)).max())

    def _follow(self, k: int) -> None:
        """Let a draft read along with k tokens that are not its own, as far as it reads its own."""
        b = self.batch
        if isinstance(self.draft, Guide):
            self.draft.follow(b)
        elif isinstance(self.draft, Pass):
            base, stored = b.field(Field.DRAFT_BASE), b.field(Field.DRAFT_NEXT)
            length, active = b.field(Field.LENGTH), b.field(Field.ACTIVE)
            segment = Segment(length, active, base, stored, T=k + 1, offset=-1)
            self.draft.run(b.feed[:, : k + 1], segment)

    def begin(self, hidden: Tensor, sampled: bool) -> None:
        """The first token of every sequence, from the stream [B, D] behind its prompt."""
        self._conclude(self.target.enter(hidden), 0, sampled, None)

    def _conclude(self, stream: Residual, k: int, sampled: bool, drafted: Tensor | None) -> None:
        """Judge k drafts per sequence by the target's stream, and commit."""
        b, drafts = self.batch, self.batch.feed[:, 2:]
        self.width = k
        if sampled:
            self._judge(stream, k, drafts, drafted)
        else:
            best = b.best[: b.size * (k + 1)]
            self.target.best(stream, k + 1, False, best, self.target_head)
            self.ops.verdict_greedy(best, drafts, drafted, b.accepted, b.following)
        if isinstance(self.draft, Guide):
            self.draft.remember(stream, b, k)
        self.ops.commit(
            b.progress, b.feed, b.history, b.accepted, b.following, drafted, b.eos, b.mailbox, k=k,
            **self.limits,
        )  # fmt: skip
        b.pinned.copy_(b.outbox, non_blocking=True)

    def _draft(self, model: Pass, k: int, sampled: bool) -> None:
        b = self.batch
        length, active = b.field(Field.LENGTH), b.field(Field.ACTIVE)
        base, stored = b.field(Field.DRAFT_BASE), b.field(Field.DRAFT_NEXT)
        for i in range(k):
            if i == 0:
                # the newest token once more: after a step that kept every draft it is unread
                segment = Segment(length, active, base, stored, T=2, offset=-1)
                tokens = b.feed[:, :2]
            else:
                segment = Segment(length, active, stored, stored, T=1, offset=i)
                tokens = b.feed[:, 1 + i : 2 + i]
            stream = model.run(tokens, segment)
            out = b.feed[:, 2 + i]
            if not sampled:
                model.best(stream, segment.T, True, out, present(self.draft_head))
                continue
            one = self._drafted(i)
            model.logits(stream, segment.T, True, one.logits)
            draw_draft(self.ops, b, one, i)

    def _judge(self, stream: Residual, k: int, drafts: Tensor, drafted: Tensor | None) -> None:
        b = self.batch
        rows = b.size * (k + 1)
        whole = self._distribution("target", b.size * (b.k + 1))
        logits, threshold, log_mass = (
            whole.logits[:rows], whole.threshold[:rows], whole.log_mass[:rows]
        )  # fmt: skip
        self.target.logits(stream, k + 1, False, logits)
        self.ops.filter_rows(logits, b.settings, threshold, log_mass)
        draft: tuple[Tensor | None, ...] = (None, None, None)
        if k and drafted is None and isinstance(self.draft, Pass | Guide):
            d, own = self._distribution("draft", b.k * b.size), k * b.size
            draft = (
                d.logits[:own].view(k, b.size, -1),
                d.threshold[:own].view(k, b.size),
                d.log_mass[:own].view(k, b.size),
            )
        self.ops.verdict_sampled(
            logits, b.settings, threshold, log_mass, *draft, drafts=drafts, lengths=drafted,
            keys=b.keys, positions=b.field(Field.WRITTEN), seed=b.seed, accepted=b.accepted,
            following=b.following,
        )  # fmt: skip

    def _distribution(self, name: str, rows: int) -> Distribution:
        """Distribution made at the first sampling: a vocabulary of 128k takes half a MB a row."""
        if name not in self.distributions:
            head = self.target.weights.head
            new = head.new_zeros(rows, len(head), dtype=torch.float32)
            self.distributions[name] = Distribution(new, new[:, 0].clone(), new[:, 0].clone())
        return self.distributions[name]

    def _drafted(self, i: int) -> Distribution:
        whole, size = self._distribution("draft", self.batch.k * self.batch.size), self.batch.size
        rows = slice(i * size, (i + 1) * size)
        return Distribution(whole.logits[rows], whole.threshold[rows], whole.log_mass[rows])
