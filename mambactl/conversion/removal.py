"""Which KV heads are missed when they see a window alone.

Every head is narrowed alone in the teacher, to the window that the student would give it; nothing
is trained or fitted. Heads that are missed most stay. Then the weakest of them are exchanged with
the best of the others as long as all that stay together do better.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from operator import attrgetter

from torch import Tensor

from mambactl import console
from mambactl.conversion.choice import Unit
from mambactl.conversion.ranking import Criterion, Instruments, Score, score_of, swap_scores
from mambactl.evaluation.controls import Narrowed
from mambactl.models.hybrid import HybridBlock
from mambactl.models.key_ring import WindowSettings
from mambactl.models.mixers.spec import StepContext

# pairs of a weak head inside and a good one outside that are tried
EXCHANGES = 8
# of text against answers, where both are shares of what all heads together lose
TEXT_WEIGHT = 0.5


@dataclass(frozen=True)
class Removal:
    """What a measurement found: units by what is missed without them, most first."""

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

    def run(self, keep: int) -> Removal:
        """Rank all units and choose `keep` of them."""
        with console.progress("select", removal_forwards(len(self.units), keep)) as task:
            whole = self._score(self.units, task)
            nothing = self._score([], task)
            scores = swap_scores(
                list(self.instruments.model.layers), self._without, self.units, self.instruments,
                task, attrgetter("layer"),
            )  # fmt: skip
            worth = self._worth(whole, scores)
            ranking = sorted(self.units, key=lambda unit: (-worth[unit], unit))
            cost = partial(self._cost, whole=whole, nothing=nothing)
            kept, score, exchanged = self._exchanged(ranking, keep, cost, task)
            front = {0: nothing, keep: score, len(self.units): whole}
            for size in _sizes(keep):
                front[size] = self._score(ranking[:size], task)
        return Removal(ranking, sorted(kept), scores, dict(sorted(front.items())), exchanged)

    def _narrowed(self, block: HybridBlock, heads: tuple[int, ...]) -> _NarrowedBlock:
        config = self.instruments.model.config
        span = self.window
        return _NarrowedBlock(block, Narrowed(span.window, span.sinks, heads, config))

    def _without(self, unit: Unit) -> _NarrowedBlock:
        return self._narrowed(self.instruments.model.layers[unit.layer], unit.heads)

    def _score(self, kept: Sequence[Unit], task: console.Task) -> Score:
        """Of the teacher in which all units but these see a window."""
        lost: dict[int, tuple[int, ...]] = {}
        for unit in self.units:
            if unit not in kept:
                lost[unit.layer] = (*lost.get(unit.layer, ()), *unit.heads)
        stack = [
            self._narrowed(block, lost[block.index]) if block.index in lost else block
            for block in self.instruments.model.layers
        ]
        score = score_of(stack, self.instruments)
        task.advance()
        return score

    def _losses(self, score: Score) -> tuple[float, ...]:
        """What the criterion counts: text alone, or text and every probe."""
        return (score.kl,) if self.criterion == "kl" else (score.kl, *score.losses)

    def _worth(self, whole: Score, scores: Mapping[Unit, Score]) -> dict[Unit, float]:
        """The largest share that a unit has in what is lost without single units.

        The largest, not the sum: a head that one probe needs must not go because others do not.
        """
        columns = zip(*(self._losses(score) for score in scores.values()), strict=True)
        worth = dict.fromkeys(scores, 0.0)
        for number, (column, base) in enumerate(zip(columns, self._losses(whole), strict=True)):
            lost = [max(0.0, value - base) for value in column]
            weight = TEXT_WEIGHT if number == 0 else 1.0
            total = sum(lost) or 1.0
            for unit, value in zip(scores, lost, strict=True):
                worth[unit] = max(worth[unit], weight * value / total)
        return worth

    def _cost(self, score: Score, whole: Score, nothing: Score) -> float:
        """What is lost of what all units together are worth, mean over the probes, plus text."""
        text, *answers = (
            (value - best) / (worst - best) if worst > best else 0.0
            for value, best, worst in zip(
                *(self._losses(each) for each in (score, whole, nothing)), strict=True
            )
        )
        return TEXT_WEIGHT * text + (sum(answers) / len(answers) if answers else 0.0)

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
        for weak, good in list(zip(kept[::-1], others, strict=False))[:EXCHANGES]:
            tried = [good if unit == weak else unit for unit in kept]
            score = self._score(tried, task)
            if cost(score) < cost(best):
                kept, best, exchanged = tried, score, exchanged + 1
        return kept, best, exchanged


def removal_forwards(candidates: int, keep: int) -> int:
    """Models that are run: those of single units from their layer on, the others whole."""
    return candidates + 3 + min(EXCHANGES, keep, candidates - keep) + len(_sizes(keep))


def _sizes(keep: int) -> list[int]:
    """Numbers of units beside `keep` whose score says what more or less cache would give."""
    return sorted({keep // 2, keep // 4} - {0, keep})
