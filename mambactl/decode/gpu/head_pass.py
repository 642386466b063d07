"""A draft head in a step of the device engine: what it remembers, and the passes of its drafts.

Between two steps it keeps the target's stream behind every token that was verified, and how many
of the drafts were accepted. The first pass of the next step reads those tokens with these streams,
which writes the head's keys of all of them as if no draft had been before; later ones read a token
and the head's own stream. What a pass writes behind the last token of a sequence is never seen:
attention sees no later position, and each is written again before it is its own.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mambactl.decode.gpu.state import ModelState, PackedModel, pack
from mambactl.decode.gpu.step import (
    Batch,
    Distribution,
    Guide,
    HeadScratch,
    Pass,
    draw_draft,
    head_scratch,
)
from mambactl.kernels.decode.operations import DecodeOps
from mambactl.kernels.decode.reference.verdict import Field
from mambactl.models.draft_head import DraftHead
from mambactl.models.packed import Residual, Segment
from mambactl.models.session_size import SessionSize


@dataclass(frozen=True)
class PackedHead:
    """A head with its layer packed for decode passes; `source` is the module itself."""

    source: DraftHead
    body: PackedModel

    @classmethod
    def of(cls, head: DraftHead, positions: int) -> "PackedHead":
        """Stack the weights of the layer; see `pack`."""
        return cls(head, pack(head.body, positions))


class HeadPass(Guide):
    """Drafts with a head; `streams` [B, k + 1, D] and `behind` int32 [B] outlive a step.

    Of the tokens before a sequence's pending one, the last `behind` are those that the head has
    read as drafts alone: it reads them again, with the first streams of its row, and the pending
    one with the stream after those.
    """

    def __init__(self, head: PackedHead, model: Pass, streams: Tensor, behind: Tensor):
        self.head, self.model = head, model
        self.streams, self.behind = streams, behind
        rows = len(behind)
        self.scratch: HeadScratch = head_scratch(
            model.ops, len(head.body.head), [rows], behind.device
        )
        self.token = torch.zeros_like(behind)
        self.ids = head.source.ids.to(torch.int32)

    @classmethod
    def of(
        cls, head: PackedHead, state: ModelState, ops: DecodeOps, size: SessionSize
    ) -> "HeadPass":
        """Drafts for sequences that hold nothing yet."""
        table = head.body.table
        streams = table.new_zeros(size.batch, size.k + 1, table.shape[1])
        behind = torch.zeros(size.batch, dtype=torch.int32, device=table.device)
        return cls(head, Pass(head.body, state, ops), streams, behind)

    def first(self, rows: int, state: ModelState) -> "HeadPass":
        """The first `rows` sequences, in the same memory; `state` is theirs."""
        model = Pass(self.head.body, state, self.model.ops)
        return HeadPass(self.head, model, self.streams[:rows], self.behind[:rows])

    @property
    def memory(self) -> list[Tensor]:
        """Tensors that outlive a step; a sequence is a row of each."""
        return [self.streams, self.behind]

    def remember(self, stream: Residual, b: Batch, k: int) -> None:
        """Keep the target's stream behind [pending, k drafts]; see `Guide`."""
        active = b.field(Field.ACTIVE) > 0
        seen = self.streams[:, : k + 1]
        new = stream.hidden.view(len(active), k + 1, -1)
        seen.copy_(torch.where(active[:, None, None], new, seen))
        self.behind.copy_(torch.where(active, b.accepted, self.behind))

    def draft(self, b: Batch, k: int, sampled: bool, drafted: list[Distribution]) -> None:
        """Write k drafts into the feed; see `Guide`."""
        hidden, start, T = self._unread(b)
        # rows that are not active may be as far behind as they like
        last = torch.arange(len(start), device=start.device) * T + self.behind.clamp(max=T - 1)
        for i in range(k):
            if i == 0:
                s = self.model.run_on(hidden, self._segment(b, start, T, 0))
                s = _rows(s, last)
            else:
                s = self.model.run_on(hidden, self._segment(b, b.field(Field.LENGTH), 1, i))
            self._choose(b, s, i, drafted[i] if sampled else None)
            if i + 1 < k:
                hidden = self._joined(s.hidden, b.feed[:, 2 + i])

    def follow(self, b: Batch) -> None:
        """Read what was accepted, and draft nothing; see `Guide`."""
        hidden, start, T = self._unread(b)
        self.model.run_on(hidden, self._segment(b, start, T, 0))

    def _unread(self, b: Batch) -> tuple[Tensor, Tensor, int]:
        """Input of the first pass [B * T, D] over T tokens of every sequence from `start` [B] on.

        A graph has room for as many as a step can accept; the host knows how many there are.
        """
        T = self.streams.shape[1]
        if self.model.ops.on_host:
            T = int((self.behind * b.field(Field.ACTIVE)).max()) + 1
        start = b.field(Field.LENGTH) - self.behind
        at = start[:, None] + torch.arange(T, device=start.device)
        tokens = b.history.gather(1, at.clamp(0, b.capacity - 1).long())
        return self._joined(self.streams[:, :T].flatten(0, 1), tokens.flatten()), start, T

    def _joined(self, streams: Tensor, tokens: Tensor) -> Tensor:
        """Input of the layer [M, D] for streams [M, D] and tokens [M].

        A pass holds its stream over the residual multiplier, which is undone here.
        """
        source = self.head.source
        scale = self.head.body.entrance
        table = self.head.body.table
        embedded = table[tokens.long().clamp(0, len(table) - 1)]
        return source.joined(streams if scale == 1 else streams / scale, embedded)

    def _segment(self, b: Batch, start: Tensor, T: int, offset: int) -> Segment:
        base = b.field(Field.DRAFT_BASE)
        return Segment(start, b.field(Field.ACTIVE), base, base, T=T, offset=offset)

    def _choose(self, b: Batch, s: Residual, i: int, one: Distribution | None) -> None:
        """Write draft i of every sequence by the head's stream [B, D]."""
        out = b.feed[:, 2 + i]
        if one is None:
            self.model.best(s, 1, True, self.token, self.scratch)
            out.copy_(self.ids[self.token.long()])
            return
        ids = self.head.source.ids
        own = one.logits.new_empty(len(out), len(ids))
        self.model.logits(s, 1, True, own)
        one.logits.fill_(float("-inf")).index_copy_(1, ids, own)
        draw_draft(self.model.ops, b, one, i)


def _rows(s: Residual, index: Tensor) -> Residual:
    """Some rows of a stream, as copies."""
    return replace(s, hidden=s.hidden[index], scaled=s.scaled[index], squares=s.squares[index])
