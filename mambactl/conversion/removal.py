"""Measure the loss from each KV head that sees a window alone.

Every head is narrowed alone in the teacher, to the window that the student would give it; nothing
is trained or fitted. All are measured on short rows, and on the longest those alone that short rows
miss. Heads that are missed most stay; then the weakest of them are exchanged with the best of the
others where all that stay together do better for it.

Answers come from a few heads that singles find. Text is shared work that other heads take over, so
where gates were trained (`mambactl.conversion.gates`) they say what a head is worth for it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from operator import attrgetter

from torch import Tensor

from mambactl import console
from mambactl.conversion.choice import Unit
from mambactl.conversion.ranking import (
    Criterion,
    Instruments,
    Score,
    joined,
    score_of,
    swap_scores,
)
from mambactl.evaluation.controls import Narrowed
from mambactl.models.block import HybridBlock
from mambactl.models.mixers.settings import WindowSettings
from mambactl.models.mixers.spec import StepContext

# pairs of a weak head inside and a good one outside that are tried, without other word
EXCHANGES = 2
# rows are long from more than so many times the shortest on, and read for one head in so many
LONG_ROW = 2
LONG_SHARE = 4
# of text against answers: in the worth of single heads, both shares of what all of them lose, and
# in the cost of a choice, both shares of what is lost when no head stays
TEXT_WORTH = 0.5
TEXT_COST = 1.0


@dataclass(frozen=True)
class Removal:
    """Result of a measurement: units ranked by the loss without them, largest first."""

    ranking: list[Unit]
    kept: list[Unit]
    scores: dict[Unit, Score]
    # how many stay -> the score of the model in which the others see a window
    front: dict[int, Score]
    exchanged: int


@dataclass(frozen=True)
class _NarrowedBlock:
    """A block of the teacher in which some KV heads see a window."""

    block: HybridBlock
    narrowed: Narrowed

    def __call__(self, hidden: Tensor, context: StepContext, cache: None) -> Tensor:
        handle = self.block.mixer.register_forward_pre_hook(self.narrowed)
        try:
            return self.block(hidden, context, cache)
        finally:
            handle.remove()


@dataclass(frozen=True)
class Removals:
    """Measures a teacher of which some units see a window and sinks."""

    instruments: Instruments
    units: Sequence[Unit]
    window: WindowSettings
    criterion: Criterion
    # what each unit is worth for text, in place of the KL without it alone
    text_worth: Mapping[Unit, float] | None = None
    exchanges: int = EXCHANGES

    def run(self, keep: int) -> Removal:
        """Rank all units and choose `keep` of them."""
        with console.progress(
            "select", removal_forwards(len(self.units), keep, self.exchanges)
        ) as task:
            whole = self._score(self.units, task)
            nothing = self._score([], task)
            scores = self._alone(task)
            worth = self._worth(whole, scores)
            ranking = sorted(self.units, key=lambda unit: (-worth[unit], unit))
            cost = partial(self._cost, whole=whole, nothing=nothing)
            kept, score, exchanged = self._exchanged(ranking, keep, cost, task)
            front = {0: nothing, keep: score, len(self.units): whole}
            for size in _sizes(keep):
                front[size] = self._score(ranking[:size], task)
        return Removal(ranking, sorted(kept), scores, dict(sorted(front.items())), exchanged)

    def _alone(self, task: console.Task) -> dict[Unit, Score]:
        """Score of the teacher with each unit narrowed alone.

        On the longest rows all but the most missed quarter count as not missed.
        """
        lengths = [probe.length for probe in self.instruments.probes.values()]
        limit = LONG_ROW * min(lengths)
        if max(lengths) <= limit:
            return self._swapped(self.units, self.instruments, task)
        short = self.instruments.only(lambda probe: probe.length <= limit, text=True)
        long = self.instruments.only(lambda probe: probe.length > limit, text=False)
        blocks = list(self.instruments.model.layers)
        base, unmissed = score_of(blocks, short), score_of(blocks, long)
        first = self._swapped(self.units, short, task)
        worth = self._worth(base, first)
        best = sorted(self.units, key=lambda unit: -worth[unit])[: long_rows(len(self.units))]
        second = self._swapped(best, long, task)
        share = short.text_tokens / self.instruments.text_tokens
        return {u: joined(score, second.get(u, unmissed), share) for u, score in first.items()}

    def _swapped(
        self, units: Sequence[Unit], instruments: Instruments, task: console.Task
    ) -> dict[Unit, Score]:
        blocks = list(instruments.model.layers)
        return swap_scores(blocks, self._without, units, instruments, task, attrgetter("layer"))

    def _window_of(self, heads: tuple[int, ...]) -> Narrowed:
        span = self.window
        return Narrowed(span.window, span.sinks, heads, self.instruments.model.config)

    def _without(self, unit: Unit) -> _NarrowedBlock:
        block = self.instruments.model.layers[unit.layer]
        return _NarrowedBlock(block, self._window_of(unit.heads))

    def _score(self, kept: Sequence[Unit], task: console.Task) -> Score:
        """Score of the teacher in which all units but `kept` see a window."""
        lost: dict[int, tuple[int, ...]] = {}
        for unit in self.units:
            if unit not in kept:
                lost[unit.layer] = (*lost.get(unit.layer, ()), *unit.heads)
        # layers that lose the same heads share a mask
        narrowed = {heads: self._window_of(heads) for heads in set(lost.values())}
        stack = [
            _NarrowedBlock(block, narrowed[lost[block.index]]) if block.index in lost else block
            for block in self.instruments.model.layers
        ]
        score = score_of(stack, self.instruments)
        task.advance()
        return score

    def _losses(self, score: Score) -> tuple[float, ...]:
        """Losses that the criterion counts: of text alone, or of text and every probe."""
        return (score.kl,) if self.criterion == "kl" else (score.kl, *score.losses)

    def _worth(self, whole: Score, scores: Mapping[Unit, Score]) -> dict[Unit, float]:
        """Loss from each unit narrowed alone, as a fraction of the sum over all units.

        Mean over the probes plus, weighted, the fraction of text.
        """
        base, count = self._losses(whole), len(self._losses(whole)) - 1
        worth = dict.fromkeys(scores, 0.0)
        for number, best in enumerate(base):
            lost = {u: max(0.0, self._losses(score)[number] - best) for u, score in scores.items()}
            if number == 0 and self.text_worth is not None:
                lost = {unit: self.text_worth[unit] for unit in scores}
            weight = TEXT_WORTH if number == 0 else 1 / count
            total = sum(lost.values()) or 1.0
            for unit, value in lost.items():
                worth[unit] += weight * value / total
        return worth

    def _cost(self, score: Score, whole: Score, nothing: Score) -> float:
        """Fraction lost of the worth of all units together, mean over the probes, plus text."""
        text, *answers = (
            max(0.0, value - best) / (worst - best) if worst > best else 0.0
            for value, best, worst in zip(
                *(self._losses(each) for each in (score, whole, nothing)), strict=True
            )
        )
        return TEXT_COST * text + (sum(answers) / len(answers) if answers else 0.0)

    def _exchanged(
        self,
        ranking: Sequence[Unit],
        keep: int,
        cost: Callable[[Score], float],
        task: console.Task,
    ) -> tuple[list[Unit], Score, int]:
        """The first `keep` of the ranking after exchanges that helped, their score and number."""
        kept, others = list(ranking[:keep]), list(ranking[keep:])
        best, exchanged = self._score(kept, task), 0
        for weak, good in list(zip(kept[::-1], others, strict=False))[: self.exchanges]:
            tried = [good if unit == weak else unit for unit in kept]
            score = self._score(tried, task)
            if cost(score) < cost(best):
                kept, best, exchanged = tried, score, exchanged + 1
        return kept, best, exchanged


def removal_forwards(candidates: int, keep: int, exchanges: int = EXCHANGES) -> int:
    """Number of models that are run: of single units from their layer on, the others whole."""
    alone = candidates + long_rows(candidates)
    tried = min(exchanges, keep, candidates - keep)
    return alone + 3 + tried + len(_sizes(keep))


def long_rows(candidates: int) -> int:
    """Number of units that are measured on the longest rows too."""
    return -(-candidates // LONG_SHARE)


def _sizes(keep: int) -> list[int]:
    """Numbers of units besides `keep` whose scores show the effect of a smaller cache."""
    return sorted({keep // 2, keep // 4} - {0, keep})
