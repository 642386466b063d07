"""Uncertainty of means: bootstrap intervals and paired tests over documents, in numpy alone.

Tokens of one document are alike, so whole units (documents, or rows where there are few of them)
are drawn again, with all of their tokens (cluster bootstrap; Efron and Tibshirani, An Introduction
to the Bootstrap, 1993, ch. 13 and 16; for paired test sets Koehn, EMNLP 2004). A draw is how often
each unit was taken, so that a thousand draws are one product of matrices.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

Array = np.ndarray
# elements of a table of draws that exist at a time
DRAWN_ELEMENTS = 2**24


@dataclass(frozen=True)
class Bootstrap:
    """`replicates` draws and the share of them that an interval holds; 0 draws: no interval."""

    confidence: float = 0.95
    replicates: int = 1000
    seed: int | tuple[int, ...] = 0

    def applies(self, units: int) -> bool:
        """True if intervals can be drawn: draws are wanted, and there is more than one unit."""
        return self.replicates > 0 and units > 1

    def draw(self, sums: Array, statistic: Callable[[Array], Array]) -> Array:
        """`statistic` [R, ...] of the totals [R, ...] of `replicates` draws of units [U, ...].

        The same seed and number of units draw the same units, which is what makes a test paired.
        """
        units = len(sums)
        flat = sums.reshape(units, -1).astype(np.float64)
        rng = np.random.default_rng(self.seed)
        even = np.full(units, 1 / units)
        size = max(1, DRAWN_ELEMENTS // units)
        found = []
        for start in range(0, self.replicates, size):
            counts = rng.multinomial(units, even, size=min(size, self.replicates - start))
            totals = counts.astype(np.float64) @ flat  # [r, ...]
            found.append(statistic(totals.reshape(-1, *sums.shape[1:])))
        return np.concatenate(found)

    def apart(self, number: int) -> "Bootstrap":
        """Bootstrap with other draws, for units unrelated to those of other `number`s."""
        seed = self.seed if isinstance(self.seed, tuple) else (self.seed,)
        return replace(self, seed=(*seed, number))

    def interval(self, draws: Array) -> list[float]:
        """The percentile interval [low, high] of draws [R]."""
        rest = (1 - self.confidence) / 2
        return [float(value) for value in np.quantile(draws, (rest, 1 - rest))]


def unit_sums(values: Array, units: Array) -> Array:
    """Sums [U, M] of values [N, M] over their units [N], which are numbered from 0."""
    count = int(units.max()) + 1 if len(units) else 0
    columns = [np.bincount(units, weights=column, minlength=count) for column in values.T]
    return np.stack(columns, -1) if columns else np.zeros((count, 0))


def means_of(totals: Array) -> Array:
    """Means [R, M] from totals [R, 1 + M] whose first column is the count."""
    return totals[:, 1:] / totals[:, :1]


def mean_intervals(sums: Array, counts: Array, bootstrap: Bootstrap) -> list[list[float]]:
    """Intervals of the M means of sums [U, M] over counts [U]; a unit weighs as its count."""
    draws = bootstrap.draw(np.column_stack([counts, sums]), means_of)
    return [bootstrap.interval(column) for column in draws.T]


def paired(
    ours: Mapping[str, Array], theirs: Mapping[str, Array], counts: Array, bootstrap: Bootstrap
) -> dict[str, dict[str, object]]:
    """Differences of means, ours - theirs, from sums [U] by name over the same units.

    Every draw takes the same units for both. `p` is two-sided: the share of draws whose distance
    from the difference found is as large as that difference, which estimates how often chance
    alone goes so far where there is none (one is added to both counts, so it is never 0).
    `units` with a difference of the same sign are counted in `wins` (ours is lower) and `losses`.
    Without enough units, `interval` and `p` are None.
    """
    names = list(ours)
    gaps = np.stack([ours[name] - theirs[name] for name in names], -1)  # [U, M]
    found = gaps.sum(0) / counts.sum()
    enough = bootstrap.applies(len(counts))
    draws = bootstrap.draw(np.column_stack([counts, gaps]), means_of) if enough else None
    result = {}
    for index, name in enumerate(names):
        result[name] = {
            "difference": float(found[index]),
            "interval": None if draws is None else bootstrap.interval(draws[:, index]),
            "p": None if draws is None else _two_sided(draws[:, index], float(found[index])),
            "wins": int((gaps[:, index] < 0).sum()),
            "losses": int((gaps[:, index] > 0).sum()),
            "units": len(counts),
        }
    return result


@dataclass(frozen=True)
class Estimate:
    """A number and its interval; None where there is none."""

    value: float | None
    interval: list[float] | None = None


@dataclass(frozen=True)
class Estimates:
    """A number of every test, in their order, and the mean of those that there are."""

    each: list[Estimate]
    mean: Estimate


def estimate(
    tests: Sequence[Array], statistic: Callable[[Array], Array], bootstrap: Bootstrap
) -> Estimates:
    """`statistic` [R] of the totals [R, M] of every test's sums [U, M], NaN where there is none.

    The units of a test are drawn apart from those of the others, and every column of a test with
    the same draws, so that what is compared in it stays paired. A test without a value is no part
    of the mean; one in which some draw has none has too few units for an interval.
    """
    found: list[Estimate] = []
    every: list[Array | None] = []
    for number, sums in enumerate(tests):
        value = float(statistic(sums.sum(0, keepdims=True))[0])
        if math.isnan(value):
            found.append(Estimate(None))
            continue
        draws = _draws(sums, statistic, bootstrap.apart(number))
        found.append(Estimate(value, None if draws is None else bootstrap.interval(draws)))
        every.append(draws)
    return Estimates(found, _mean(found, every, bootstrap))


def ratios(ours: Sequence[Array], theirs: Sequence[Array], bootstrap: Bootstrap) -> Estimates:
    """Ratios of sums, ours / theirs, over the same units [U] of every test; none over 0."""
    pairs = zip(ours, theirs, strict=True)
    return estimate([np.column_stack(pair) for pair in pairs], ratio_of, bootstrap)


def ratio_of(totals: Array) -> Array:
    """Ratios [R] of the first to the second of two totals [R, 2]; NaN where that is 0."""
    ours, theirs = totals[:, 0], totals[:, 1]
    return np.divide(ours, theirs, out=np.full(len(totals), np.nan), where=theirs != 0)


def mean_difference_of(totals: Array) -> Array:
    """Differences [R] of means, ours - theirs, from totals [R, 3]: a count, ours, and theirs."""
    return (totals[:, 1] - totals[:, 2]) / totals[:, 0]


def _draws(sums: Array, statistic: Callable[[Array], Array], bootstrap: Bootstrap) -> Array | None:
    draws = bootstrap.draw(sums, statistic) if bootstrap.applies(len(sums)) else None
    return None if draws is None or np.isnan(draws).any() else draws


def _mean(found: list[Estimate], every: list[Array | None], bootstrap: Bootstrap) -> Estimate:
    values = [each.value for each in found if each.value is not None]
    if not values:
        return Estimate(None)
    draws = [each for each in every if each is not None]
    whole = len(draws) == len(values)
    interval = bootstrap.interval(np.mean(draws, 0)) if whole else None
    return Estimate(float(np.mean(values)), interval)


def _two_sided(draws: Array, found: float) -> float:
    # a sum in another order must not decide
    far = np.abs(draws - found) >= abs(found) * (1 - 1e-9)
    return float((1 + far.sum()) / (1 + len(draws)))
