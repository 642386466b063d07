"""Rank layers or KV heads by their need for attention: change one at a time and measure.

Two uses of one walk. Into a teacher, each changed layer is swapped alone: what costs little may go.
Into a model of aligned Mamba mixers, the teacher's attention is restored layer by layer,
always where it helps most (greedy addition), which gives a whole front of quality against cache.
Layers before a swap are not run again: the walk carries the hidden states that enter each layer.
"""

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import astuple, dataclass, replace
from functools import reduce
from typing import Generic, Literal, Protocol, TypeVar

import torch
from torch import Tensor, nn

from mambactl import console
from mambactl.data.pack import Batch
from mambactl.evaluation.recall import RecallProbe, read_answers, summarise_answers
from mambactl.generation.dealer import ALONE, Dealer, unheard
from mambactl.models.block import HybridBlock
from mambactl.models.hybrid import HybridForCausalLM
from mambactl.models.mixers.spec import StepContext
from mambactl.options import ConvertConfig
from mambactl.ranks import processes

Criterion = Literal["kl", "recall"]


def criterion_of(config: ConvertConfig) -> Criterion:
    """The measure that layers are chosen by; ValueError where they are chosen by rule."""
    if config.select == "uniform":
        raise ValueError("layers that are chosen by rule have no measure")
    return config.select


# candidates that are measured again after each accepted layer: interactions are local
TOP = 8
# logits of one model that may exist at a time, in elements
CHUNK_ELEMENTS = 2**24
# swapped models whose last hidden states are held at a time
TOGETHER = 32
# groups of candidates for each of several processes: small ones, so that none waits for long
SHARES = 4

K = TypeVar("K", bound=Hashable)


class AnyBlock(Protocol):
    """A block of a stack, or its substitute."""

    def __call__(self, hidden: Tensor, context: StepContext, cache: None) -> Tensor: ...


@dataclass(frozen=True)
class Score:
    """KL(teacher || swapped) in nats per token of held-out text; recall where it was measured.

    Recall and its loss are means over the probes, `losses` those of each.
    """

    kl: float
    recall: float | None = None
    recall_loss: float | None = None
    losses: tuple[float, ...] = ()

    def values(self) -> dict[str, float]:
        """Measured values by name."""
        named = {"kl": self.kl, "recall": self.recall, "recall_loss": self.recall_loss}
        return {name: value for name, value in named.items() if value is not None}

    def rounded(self) -> dict[str, float]:
        """Measured values by name, rounded to six decimals for a record."""
        return {name: round(value, 6) for name, value in self.values().items()}

    def gain(self, other: "Score") -> tuple[float, float]:
        """Reduction of KL and of recall loss from this score to `other`."""
        recall = (self.recall_loss or 0.0) - (other.recall_loss or 0.0)
        return self.kl - other.kl, recall


def joined(short: Score, long: Score, share: float) -> Score:
    """Score on two sets of probes; `share` of the text is that of the first."""
    counts = len(short.losses), len(long.losses)

    def mean(name: str) -> float:
        pairs = zip(counts, (getattr(short, name), getattr(long, name)), strict=True)
        return sum(count * value for count, value in pairs if count) / sum(counts)

    kl = share * short.kl + (1 - share) * long.kl
    return Score(kl, mean("recall"), mean("recall_loss"), short.losses + long.losses)


def headings(scores: Iterable[Score]) -> list[str]:
    """Columns of a table of scores."""
    with_recall = any(score.recall is not None for score in scores)
    return ["KL", *(["recall", "recall loss"] if with_recall else [])]


def cells(score: Score) -> list[str]:
    """Row of a table of scores."""
    return [f"{value:.4f}" for value in score.values().values()]


@dataclass(frozen=True)
class Step:
    """One accepted layer of the greedy addition (None: none yet) and the resulting score."""

    layer: int | None
    score: Score


@dataclass(frozen=True)
class PickedRows:
    """Rows on their way through the layers.

    `picked` [B, T] marks the n predictions that are read. Of those `asked` [n] are answers, which
    should be `targets`; the others are text, on which the teacher's last states are `guide`.
    """

    hidden: Tensor
    context: StepContext
    picked: Tensor
    asked: Tensor
    targets: Tensor
    guide: Tensor
    probe: int | None = None


class Instruments:
    """Measurements of a stack of blocks: KL on held-out text and, if wanted, recall.

    `teacher` gives embedding, masks, norm and head, and the states that students are compared
    with; its blocks may be used in stacks. Text in the rows of a probe counts as held-out text.
    """

    def __init__(
        self,
        teacher: HybridForCausalLM,
        batches: Sequence[Batch],
        recall: RecallProbe | Sequence[RecallProbe] | None = None,
        batch_size: int = 4,
        dealer: Dealer = ALONE,
    ):
        self.model, self.dealer = teacher.model, dealer
        self.head = teacher.lm_head
        probes = [recall] if isinstance(recall, RecallProbe) else recall or ()
        self.probes = dict(enumerate(probes))
        device = teacher.lm_head.weight.device
        # everything that has to go through the layers
        rows = [self._read(batch.to(device)) for batch in batches]
        for index, probe in self.probes.items():
            parts = (
                t.to(device).split(batch_size)
                for t in (probe.input_ids, probe.picked, probe.spoken)
            )
            for ids, picked, spoken in zip(*parts, strict=True):
                rows.append(self._rows(ids, picked | spoken, picked, probe=index))
        guides = dealer.results(rows, self._guide)
        self.rows = [
            replace(each, guide=guide.to(device)) for each, guide in zip(rows, guides, strict=True)
        ]

    def only(self, wanted: Callable[[RecallProbe], bool], text: bool) -> "Instruments":
        """A part of the probes, with or without the text of its own."""
        part = copy(self)
        part.probes = {i: probe for i, probe in self.probes.items() if wanted(probe)}
        part.rows = [
            rows
            for rows in self.rows
            if (text if rows.probe is None else rows.probe in part.probes)
        ]
        return part

    @property
    def text_tokens(self) -> int:
        """Tokens that the KL is a mean over."""
        return sum(len(rows.guide) for rows in self.rows)

    def _read(self, batch: Batch) -> PickedRows:
        picked = nn.functional.pad(batch.loss_mask[:, 1:], (0, 1))
        nothing = torch.zeros_like(picked)
        return self._rows(batch.input_ids, picked, nothing, batch.position_ids, batch.seq_idx)

    @torch.no_grad()
    def _rows(
        self,
        ids: Tensor,
        picked: Tensor,
        answers: Tensor,
        position_ids: Tensor | None = None,
        seq_idx: Tensor | None = None,
        probe: int | None = None,
    ) -> PickedRows:
        hidden = self.model.embedded(ids)
        context = self.model.context(hidden, position_ids, seq_idx=seq_idx)
        asked, targets = answers[picked], ids.roll(-1, 1)[answers]
        return PickedRows(hidden, context, picked, asked, targets, hidden.new_zeros(0), probe)

    def _guide(self, rows: PickedRows) -> Tensor:
        """The teacher's last states where text is predicted."""
        if bool(rows.asked.all()):
            return rows.guide
        last = through(self.model.layers, rows.hidden, rows.context)
        return self.finish(rows, last)[~rows.asked]

    @torch.no_grad()
    def finish(self, rows: PickedRows, hidden: Tensor) -> Tensor:
        """Inputs of the head [n, D], picked from the states behind the last layer [B, T, D]."""
        return self.model.norm(hidden[rows.picked])

    @torch.no_grad()
    def scores(self, found: Mapping[K, Sequence[Tensor]]) -> dict[K, Score]:
        """Read out swapped models by key; each has a tensor of `finish` per entry of `rows`.

        All are read together, so that the teacher's logits are made once.
        """
        parts = [
            self.read(rows, [states[index] for states in found.values()])
            for index, rows in enumerate(self.rows)
        ]
        return dict(zip(found, self.summed(parts, len(found)), strict=True))

    @torch.no_grad()
    def read(self, rows: PickedRows, students: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Read what `finish` gave of some rows: sums of the KL by piece of text [pieces, S], and
        each student's answers [n, 2].
        """
        weight = self.head.weight
        size = max(1, CHUNK_ELEMENTS // weight.shape[0])
        texts = [states[~rows.asked] for states in students]
        shape = (-(-len(rows.guide) // size), len(students))
        sums = torch.zeros(shape, dtype=torch.float64, device=weight.device)
        for number, guide in enumerate(rows.guide.split(size) if len(rows.guide) else ()):
            piece = slice(number * size, (number + 1) * size)
            log_p = self.head(guide).float().log_softmax(-1)  # [n, V]
            p = log_p.exp()
            for i, text in enumerate(texts):
                log_q = self.head(text[piece]).float().log_softmax(-1)
                sums[number, i] = (p * (log_p - log_q)).sum().double()
        if rows.probe is None:
            return sums, []
        answers = [states[rows.asked] for states in students]
        return sums, [read_answers(each, self.head, rows.targets) for each in answers]

    def summed(
        self, parts: Sequence[tuple[Tensor, Sequence[Tensor]]], students: int
    ) -> list[Score]:
        """Score of each student from what `read` gave of all rows, added in their order."""
        pieces = [piece for sums, _ in parts for piece in sums]
        kl = [0.0] * students
        if pieces:
            kl = (reduce(torch.add, pieces) / max(1, self.text_tokens)).tolist()
        recalled = [self._recall([read for _, read in parts], i) for i in range(students)]
        return [Score(kl[i], *recalled[i]) for i in range(students)]

    def _recall(
        self, answers: Sequence[Sequence[Tensor]], student: int
    ) -> tuple[float | None, float | None, tuple[float, ...]]:
        """Mean recall, mean loss and the loss of every probe."""
        if not self.probes:
            return None, None, ()
        found = []
        for index, probe in self.probes.items():
            read = [
                each[student]
                for each, rows in zip(answers, self.rows, strict=True)
                if rows.probe == index
            ]
            found.append(summarise_answers(torch.cat(read), probe.width))
        recall, losses = ([each[name] for each in found] for name in ("recall", "recall_loss"))
        return sum(recall) / len(found), sum(losses) / len(found), tuple(losses)


@torch.no_grad()
def through(blocks: Iterable[AnyBlock], hidden: Tensor, context: StepContext) -> Tensor:
    """The states [B, T, D] behind a stack of blocks."""
    for block in blocks:
        hidden = block(hidden, context, None)
    return hidden


def swap_scores(
    blocks: Sequence[AnyBlock],
    swap: Callable[[K], AnyBlock],
    candidates: Sequence[K],
    instruments: Instruments,
    task: console.Task,
    layer_of: Callable[[K], int] = int,
) -> dict[K, Score]:
    """Score of the stack `blocks` with `swap(c)` in place of one block, for each candidate alone.

    `layer_of(c)` says which. `swap` is asked layer by layer and its block is dropped when it has
    been run. Several processes share the candidates.
    """
    dealer = instruments.dealer
    ordered = sorted(candidates, key=layer_of)
    size = TOGETHER
    if dealer.shared:
        size = max(1, min(TOGETHER, len(ordered) // (SHARES * processes())))
    groups = [ordered[start : start + size] for start in range(0, len(ordered), size)]
    walk = _Walk(blocks, swap, instruments, layer_of)
    # where there is one process, a group may take minutes
    steps, whole = (unheard, task.advance) if dealer.shared else (task.advance, unheard)

    def measure(group: list[K]) -> list[tuple]:
        return [astuple(score) for score in walk.scores(group, steps)]

    found = dealer.results(groups, measure, whole, len)
    return {
        candidate: Score(*values)
        for group, scores in zip(groups, found, strict=True)
        for candidate, values in zip(group, scores, strict=True)
    }


class _Walk(Generic[K]):
    """A walk through the layers of a stack, which stops where one is swapped."""

    def __init__(
        self,
        blocks: Sequence[AnyBlock],
        swap: Callable[[K], AnyBlock],
        instruments: Instruments,
        layer_of: Callable[[K], int],
    ):
        self.blocks, self.swap, self.instruments = blocks, swap, instruments
        self.layer_of = layer_of
        self.index, self.states = 0, [rows.hidden for rows in instruments.rows]

    def scores(self, candidates: Sequence[K], advance: Callable[[int], None]) -> list[Score]:
        """Scores of candidates at this layer or later ones, in their order."""
        found = {}
        for candidate in candidates:
            self._reach(self.layer_of(candidate))
            other = [self.swap(candidate), *self.blocks[self.index + 1 :]]
            found[candidate] = [
                self.instruments.finish(rows, through(other, hidden, rows.context))
                for rows, hidden in zip(self.instruments.rows, self.states, strict=True)
            ]
            advance(1)
        return list(self.instruments.scores(found).values())

    def _reach(self, layer: int) -> None:
        passed = self.blocks[self.index : layer]
        self.states = [
            through(passed, hidden, rows.context)
            for rows, hidden in zip(self.instruments.rows, self.states, strict=True)
        ]
        self.index = layer


def score_of(blocks: Sequence[AnyBlock], instruments: Instruments) -> Score:
    """Score of a stack as it is; several processes share the rows."""

    def measure(rows: PickedRows) -> tuple[Tensor, list[Tensor]]:
        last = through(blocks, rows.hidden, rows.context)
        return instruments.read(rows, [instruments.finish(rows, last)])

    return instruments.summed(instruments.dealer.results(instruments.rows, measure), 1)[0]


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
    """Worth of each layer's attention, from its (KL, recall loss) gains.

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
