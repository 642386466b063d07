"""How sure a mean is: bootstrap intervals and paired tests over documents, in numpy alone.

Tokens of one document are alike, so whole units (documents, or rows where there are few of them)
are drawn again, with all of their tokens (cluster bootstrap; Efron and Tibshirani, An Introduction
to the Bootstrap, 1993, ch. 13 and 16; for paired test sets Koehn, EMNLP 2004). A draw is how often
each unit was taken, so that a thousand draws are one product of matrices.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray
# elements of a table of draws that exist at a time
DRAWN_ELEMENTS = 2**24


@dataclass(frozen=True)
class Bootstrap:
    """`replicates` draws and the share of them that an interval holds; 0 draws: no interval."""

    confidence: float = 0.95
    replicates: int = 1000
    seed: int = 0

    def applies(self, units: int) -> bool:
        """Whether there is anything to draw: one unit says nothing about others."""
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
    """Means [R, M] from totals [R, 1 + M] whose first column counts what was summed."""
    return totals[:, 1:] / totals[:, :1]


def mean_intervals(sums: Array, counts: Array, bootstrap: Bootstrap) -> list[list[float]]:
    """Intervals of the M means of sums [U, M] over counts [U]; a unit weighs as its count."""
    draws = bootstrap.draw(np.column_stack([counts, sums]), means_of)
    return [bootstrap.interval(column) for column in draws.T]


def paired(
    ours: Mapping[str, Array], theirs: Mapping[str, Array], counts: Array, bootstrap: Bootstrap
) -> dict[str, dict[str, Any]]:
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


def _two_sided(draws: Array, found: float) -> float:
    # a sum in another order must not decide
    far = np.abs(draws - found) >= abs(found) * (1 - 1e-9)
    return float((1 + far.sum()) / (1 + len(draws)))
