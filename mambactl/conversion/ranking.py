"""Which layers can do without attention: swap the mixer of one layer at a time and measure.

Two uses of one walk. Into a teacher, each layer's Mamba mixer is swapped alone: what costs little
may go. Into a model of aligned Mamba mixers, the teacher's attention is restored layer by layer,
always where it helps most (greedy addition), which gives a whole front of quality against cache.
Layers before a swap are not run again: the walk carries the hidden states that enter each layer.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from mambactl import console
from mambactl.data.pack import Batch
from mambactl.evaluation.recall import RecallProbe, read_answers, summarise_answers
from mambactl.models.hybrid import HybridBlock, HybridForCausalLM
from mambactl.models.mixers.spec import StepContext

Criterion = Literal["kl", "recall"]
# candidates that are measured again after each accepted layer: interactions are local
TOP = 8
# logits of one model that may exist at a time, in elements
CHUNK_ELEMENTS = 2**24


@dataclass(frozen=True)
class Score:
    """KL(teacher || swapped) in nats per token of held-out text; recall where it was measured."""

    kl: float
    recall: float | None = None
    recall_loss: float | None = None

    def gain(self, other: "Score") -> tuple[float, float]:
        """By how much KL and recall loss are lower in `other`."""
        recall = (self.recall_loss or 0.0) - (other.recall_loss or 0.0)
        return self.kl - other.kl, recall


@dataclass(frozen=True)
class Step:
    """One accepted layer of the greedy addition (None: none yet) and what it led to."""

    layer: int | None
    score: Score


@dataclass(frozen=True)
class _Rows:
    """Rows on their way through the layers; `guide` [n, D] is the teacher's last hidden state.

    `picked` [B, T] marks predictions that count and `targets` [n] what they should be.
    """

    hidden: Tensor
    context: StepContext
    picked: Tensor
    targets: Tensor
    guide: Tensor | None


class Instruments:
    """What is measured: KL on held-out text and, if wanted, recall.

    `teacher` gives embedding, masks, norm and head, and the states that students are compared
    with; its blocks may be used in stacks.
    """

    def __init__(
        self,
        teacher: HybridForCausalLM,
        batches: Sequence[Batch],
        recall: RecallProbe | None = None,
        batch_size: int = 4,
    ):
        self.model = teacher.model
        self.head = teacher.lm_head
        self.recall = recall
        device = teacher.lm_head.weight.device
        self.text = [self._read(batch.to(device)) for batch in batches]
        self.asked = []
        if recall is not None:
            parts = (t.to(device).split(batch_size) for t in (recall.input_ids, recall.picked))
            self.asked = [self._rows(ids, picked) for ids, picked in zip(*parts, strict=True)]

    @property
    def rows(self) -> list[_Rows]:
        """Everything that has to go through the layers."""
        return [*self.text, *self.asked]

    def _read(self, batch: Batch) -> _Rows:
        picked = nn.functional.pad(batch.loss_mask[:, 1:], (0, 1))
        rows = self._rows(batch.input_ids, picked, batch.position_ids, batch.seq_idx)
        guide = self.finish(rows, _through(self.model.layers, rows.hidden, rows.context))
        return _Rows(rows.hidden, rows.context, rows.picked, rows.targets, guide)

    @torch.no_grad()
    def _rows(
        self,
        ids: Tensor,
        picked: Tensor,
        position_ids: Tensor | None = None,
        seq_idx: Tensor | None = None,
    ) -> _Rows:
        hidden = self.model.embed_tokens(ids)
        context = self.model.context(hidden, position_ids, seq_idx=seq_idx)
        return _Rows(hidden, context, picked, ids.roll(-1, 1)[picked], None)

    @torch.no_grad()
    def finish(self, rows: _Rows, hidden: Tensor) -> Tensor:
        """What the head reads [n, D] of the states behind the last layer [B, T, D]."""
        return self.model.norm(hidden[rows.picked])

    @torch.no_grad()
    def scores(self, found: Mapping[int, Sequence[Tensor]]) -> dict[int, Score]:
        """Read out swapped models by key; each has a tensor of `finish` per entry of `rows`.

        All are read together, so that the teacher's logits are made once.
        """
        weight = self.head.weight
        totals = torch.zeros(len(found), dtype=torch.float64, device=weight.device)
        size = max(1, CHUNK_ELEMENTS // weight.shape[0])
        for index, rows in enumerate(self.text):
            for start in range(0, len(rows.targets), size):
                piece = slice(start, start + size)
                log_p = self.head(rows.guide[piece]).float().log_softmax(-1)  # [n, V]
                p = log_p.exp()
                for i, states in enumerate(found.values()):
                    log_q = self.head(states[index][piece]).float().log_softmax(-1)
                    totals[i] += (p * (log_p - log_q)).sum().double()
        tokens = sum(len(rows.targets) for rows in self.text)
        kl = (totals / tokens).tolist()
        recalled = [self._recall(states[len(self.text) :]) for states in found.values()]
        return {key: Score(kl[i], *recalled[i]) for i, key in enumerate(found)}

    def _recall(self, states: Sequence[Tensor]) -> tuple[float, ...]:
        if self.recall is None:
            return ()
        read = [
            read_answers(each, self.head, rows.targets)
            for each, rows in zip(states, self.asked, strict=True)
        ]
        found = summarise_answers(torch.cat(read), self.recall.width)
        return found["recall"], found["recall_loss"]


@torch.no_grad()
def _through(blocks: Sequence[HybridBlock], hidden: Tensor, context: StepContext) -> Tensor:
    for block in blocks:
        hidden = block(hidden, context, None)
    return hidden


def swap_scores(
    blocks: Sequence[HybridBlock],
    swap: Callable[[int], HybridBlock],
    candidates: Sequence[int],
    instruments: Instruments,
    task: console.Task,
) -> dict[int, Score]:
    """Score of the stack `blocks` with `swap(i)` in place of block i, for each candidate alone.

    `swap` is asked in ascending order and its block is dropped when it has been run.
    """
    found: dict[int, list[Tensor]] = {}
    states = [rows.hidden for rows in instruments.rows]
    for index in range(max(candidates) + 1):
        if index in candidates:
            other = [swap(index), *blocks[index + 1 :]]
            found[index] = [
                instruments.finish(rows, _through(other, hidden, rows.context))
                for rows, hidden in zip(instruments.rows, states, strict=True)
            ]
            task.advance()
        states = [
            _through([blocks[index]], hidden, rows.context)
            for rows, hidden in zip(instruments.rows, states, strict=True)
        ]
    return instruments.scores(found)


def score_of(blocks: Sequence[HybridBlock], instruments: Instruments) -> Score:
    """Score of a stack as it is."""
    states = [
        instruments.finish(rows, _through(blocks, rows.hidden, rows.context))
        for rows in instruments.rows
    ]
    return instruments.scores({0: states})[0]


def greedy_addition(
    blocks: Sequence[HybridBlock],
    attention: Mapping[int, HybridBlock],
    keep: int,
    criterion: Criterion,
    instruments: Instruments,
    task: console.Task,
    top: int = TOP,
) -> tuple[list[Step], dict[int, Score]]:
    """Restore `keep` of the attention blocks where that helps most; no weight changes.

    Returns the path, starting with no attention at all, and the score of restoring each layer
    alone. After an accepted layer the `top` best candidates of the last ranking are measured
    again, the rest keep what they had gained.
    """
    stack = list(blocks)
    path = [Step(None, score_of(stack, instruments))]
    alone: dict[int, Score] = {}
    # drop in KL and in recall loss by the latest measurement of every candidate
    gains: dict[int, tuple[float, float]] = {}
    asked = list(attention)
    for _ in range(keep):
        base = path[-1].score
        scores = swap_scores(stack, attention.__getitem__, asked, instruments, task)
        alone = alone or scores
        gains |= {index: base.gain(score) for index, score in scores.items()}
        worth = merit(gains, criterion)
        best = max(asked, key=worth.__getitem__)
        stack[best] = attention[best]
        path.append(Step(best, scores[best]))
        del gains[best]
        if gains:
            worth = merit(gains, criterion)
            asked = sorted(sorted(gains, key=worth.__getitem__, reverse=True)[:top])
    return path, alone


def addition_forwards(candidates: int, keep: int, top: int = TOP) -> int:
    """Swapped models that `greedy_addition` runs, about half of the layers each."""
    return sum(candidates if step == 0 else min(top, candidates - step) for step in range(keep))


def merit(gains: Mapping[int, tuple[float, float]], criterion: Criterion) -> dict[int, float]:
    """How much each layer's attention is worth, from its (KL, recall loss) gains.

    `kl`: by KL alone. `recall`: the sum of both after standardising each over the candidates, as
    KL is in nats per token of text and recall in nats per value. NaN, of a model that diverges
    with and without that layer, comes last.
    """
    parts = zip(*gains.values(), strict=True)
    columns = [_standardised(column) for column in parts][: 1 if criterion == "kl" else 2]
    return {index: sum(column[rank] for column in columns) for rank, index in enumerate(gains)}


def _standardised(values: Sequence[float]) -> list[float]:
    finite = [value for value in values if math.isfinite(value)] or [0.0]
    mean = sum(finite) / len(finite)
    spread = math.sqrt(sum((value - mean) ** 2 for value in finite) / len(finite)) or 1.0
    return [
        (v - mean) / spread if math.isfinite(v) else math.inf if v > 0 else -math.inf
        for v in values
    ]
