"""One decode step on the device: draft, verify, accept, commit, with no question to the host."""

from dataclasses import dataclass

import torch
from torch import Tensor

from mambactl.decode.gpu.batch import Batch
from mambactl.decode.gpu.forward import HeadScratch, Pass, head_scratch
from mambactl.kernels.decode.operations import DecodeOps
from mambactl.kernels.decode.reference.control import Field
from mambactl.kernels.random import Stream
from mambactl.models.packed import Residual, Segment


@dataclass
class Distribution:
    """Logits [.., V] with what filtering found, for sampled decoding."""

    logits: Tensor
    threshold: Tensor
    log_mass: Tensor


class Step:
    """The kernels of a step for one batch; `draft` is a second model, "ngram" or None."""

    def __init__(
        self,
        batch: Batch,
        target: Pass,
        draft: Pass | str | None,
        ops: DecodeOps,
        *,
        limit: int,
        draft_limit: int,
    ):
        self.batch, self.target, self.draft, self.ops = batch, target, draft, ops
        self.limits = {"span": batch.k + 1, "limit": limit, "draft_limit": draft_limit}
        self.target_head = self._head(target, [batch.size * n for n in range(1, batch.k + 2)])
        self.draft_head = self._head(draft, [batch.size]) if isinstance(draft, Pass) else None
        self.distributions: dict[str, Distribution] = {}

    def _head(self, model: Pass, rows: list[int]) -> HeadScratch:
        head = model.weights.head
        return head_scratch(self.ops, len(head), rows, head.device)

    def run(self, k: int, sampled: bool) -> None:
        """One step with k drafts per sequence."""
        b = self.batch
        drafted = None
        if k and isinstance(self.draft, Pass):
            self._draft(k, sampled)
        elif k:
            drafted = b.drafted
            torch.add(b.field(Field.LENGTH), 1, out=b.present)
            self.ops.draft_ngram(b.history, b.present, b.feed[:, 2:], k, drafted)
        segment = Segment(
            b.field(Field.LENGTH), b.field(Field.ACTIVE), b.field(Field.BASE), b.field(Field.NEXT),
            T=k + 1,
        )  # fmt: skip
        stream = self.target.run(b.feed[:, 1 : 2 + k], segment)
        drafts = b.feed[:, 2:]
        if sampled:
            self._judge(stream, k, drafts, drafted)
        else:
            best = b.best[: segment.rows]
            self.target.best(stream, k + 1, False, best, self.target_head)
            self.ops.verdict_greedy(best, drafts, drafted, b.accepted, b.following)
        self.ops.commit(
            b.control, b.feed, b.history, b.accepted, b.following, drafted, b.eos, b.mailbox, k,
            **self.limits,
        )  # fmt: skip
        b.pinned.copy_(b.mailbox, non_blocking=True)

    def _draft(self, k: int, sampled: bool) -> None:
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
            stream = self.draft.run(tokens, segment)
            out = b.feed[:, 2 + i]
            if not sampled:
                self.draft.best(stream, segment.T, True, out, self.draft_head)
                continue
            one = self._drafted(i)
            self.draft.logits(stream, segment.T, True, one.logits)
            self.ops.filter_rows(one.logits, b.settings, one.threshold, one.log_mass)
            self.ops.draw_rows(
                one.logits, b.settings, one.threshold, one.log_mass, b.keys,
                b.field(Field.WRITTEN), b.seed, int(Stream.PROPOSE), out, offset=i,
            )  # fmt: skip

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
        if k and isinstance(self.draft, Pass):
            d = self._distribution("draft", b.k * b.size)
            draft = (
                d.logits.view(b.k, b.size, -1)[:k],
                d.threshold.view(b.k, b.size)[:k],
                d.log_mass.view(b.k, b.size)[:k],
            )
        self.ops.verdict_sampled(
            logits, b.settings, threshold, log_mass, *draft, drafts, drafted, b.keys,
            b.field(Field.WRITTEN), b.seed, b.accepted, b.following,
        )  # fmt: skip

    def _distribution(self, name: str, rows: int) -> Distribution:
        """Made when sampling is first asked for: a vocabulary of 128k takes half a MB a row."""
        if name not in self.distributions:
            head = self.target.weights.head
            new = head.new_zeros(rows, len(head), dtype=torch.float32)
            self.distributions[name] = Distribution(new, new[:, 0].clone(), new[:, 0].clone())
        return self.distributions[name]

    def _drafted(self, i: int) -> Distribution:
        whole, size = self._distribution("draft", self.batch.k * self.batch.size), self.batch.size
        rows = slice(i * size, (i + 1) * size)
        return Distribution(whole.logits[rows], whole.threshold[rows], whole.log_mass[rows])
