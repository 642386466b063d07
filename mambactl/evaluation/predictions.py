"""Measurements of every prediction, and the statistics made from them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mambactl.evaluation.calibration import ERRORS, binned, calibration_errors
from mambactl.evaluation.statistics import Bootstrap, mean_intervals, means_of, paired, unit_sums
from mambactl.json_values import JsonObject

# first context position of every bucket that results are broken down into
BUCKET_STARTS = (0, 64, 256, 1024, 4096)
# every doubling, for text that is as long as a context may be
LONG_BUCKET_STARTS = (0, 64, *(2**power for power in range(7, 21)))

MEANS = ("kl", "reverse_kl", "agreement", "top5", "acceptance", "ce", "teacher_ce")
# what a paired test compares two students in
PAIRED = ("kl", "agreement", "ce")
# fewer documents say too little about others; then rows are drawn again
FEWEST_DOCUMENTS = 10
UNITS = ("documents", "rows")


@dataclass(frozen=True)
class Predictions:
    """N predictions on the same text by name of a student, each student's columns [N] by name.

    `positions` are how many tokens stood before, `documents` and `rows` say where [N], in numbers
    of the data set's order.
    """

    values: Mapping[str, Mapping[str, np.ndarray]]
    positions: np.ndarray
    documents: np.ndarray
    rows: np.ndarray

    @property
    def row_count(self) -> int:
        """Rows with a prediction."""
        return len(np.unique(self.rows))

    @property
    def resampled(self) -> str:
        """Unit of resampling: documents where there are enough, else rows."""
        enough = len(np.unique(self.documents)) >= FEWEST_DOCUMENTS
        return UNITS[0] if enough else UNITS[1]

    def units(self) -> np.ndarray:
        """The unit of every prediction [N], numbered from 0."""
        found = self.documents if self.resampled == UNITS[0] else self.rows
        return np.unique(found, return_inverse=True)[1]

    def summary(
        self,
        name: str,
        bootstrap: Bootstrap | None = None,
        starts: Sequence[int] = BUCKET_STARTS,
        samples: bool = False,
    ) -> JsonObject:
        """Every number of one student, with `by_position` from `starts` and `intervals`."""
        values = self.values[name]
        means = {column: float(values[column].mean()) for column in MEANS}
        result: JsonObject = {
            "tokens": len(self.positions),
            **means,
            "kl_p95": float(np.quantile(values["kl"], 0.95)),
            **_perplexities(means["ce"], means["teacher_ce"]),
            **self._calibration(values),
            "by_position": self._by_position(values, starts),
        }
        if bootstrap is not None and (intervals := self._intervals(values, bootstrap)):
            result |= {
                "intervals": intervals,
                "confidence": bootstrap.confidence,
                "bootstrap": bootstrap.replicates,
                "resampled": self.resampled,
            }
        if samples:
            result["samples"] = self._samples(values)
        return result

    def compare(self, ours: str, theirs: str, bootstrap: Bootstrap) -> JsonObject:
        """A paired test of two students, `ours` - `theirs`, in each of `PAIRED`."""
        units = self.units()
        sums = [
            {name: np.bincount(units, weights=self.values[who][name]) for name in PAIRED}
            for who in (ours, theirs)
        ]
        mine, others = sums
        tests = paired(mine, others, np.bincount(units), bootstrap)
        about = {"resampled": self.resampled, "confidence": bootstrap.confidence}
        return {**about, "bootstrap": bootstrap.replicates, "tests": tests}

    def _calibration(self, values: Mapping[str, np.ndarray]) -> dict[str, float]:
        alone = np.zeros(len(self.positions), np.int64)
        count = np.array([len(self.positions)])
        return {
            error: float(calibration_errors(binned(values, alone, error), count)[0])
            for error in ERRORS
        }

    def _intervals(
        self, values: Mapping[str, np.ndarray], bootstrap: Bootstrap
    ) -> dict[str, list[float]]:
        units = self.units()
        counts = np.bincount(units)
        if not bootstrap.applies(len(counts)):
            return {}
        # the logarithm of the ratio of perplexities is one more mean
        columns = [*(values[name] for name in MEANS), values["ce"] - values["teacher_ce"]]
        found = mean_intervals(unit_sums(np.stack(columns, -1), units), counts, bootstrap)
        result: dict[str, list[float]] = dict(zip(MEANS, found, strict=False))
        logs = {"perplexity": "ce", "teacher_perplexity": "teacher_ce"}
        ends = {name: result[log] for name, log in logs.items()} | {"perplexity_ratio": found[-1]}
        result |= {name: [_exp(end) for end in pair] for name, pair in ends.items()}
        for error in ERRORS:
            table = np.column_stack([counts, binned(values, units, error)])
            draws = bootstrap.draw(
                table, lambda totals: calibration_errors(totals[:, 1:], totals[:, 0])
            )
            result[error] = bootstrap.interval(draws)
        return result

    def _samples(self, values: Mapping[str, np.ndarray]) -> dict[str, list[float]]:
        """Means per unit, so that a later test can pair them with another model's."""
        units = self.units()
        counts = np.bincount(units)
        source = self.documents if self.resampled == UNITS[0] else self.rows
        sums = unit_sums(np.stack([values[name] for name in MEANS], -1), units)
        means = means_of(np.column_stack([counts, sums])).T
        return {
            "unit": np.unique(source).tolist(),
            "tokens": counts.tolist(),
            **{name: column.tolist() for name, column in zip(MEANS, means, strict=True)},
        }

    def _by_position(
        self, values: Mapping[str, np.ndarray], starts: Sequence[int]
    ) -> dict[str, dict[str, float]]:
        ends = (*starts[1:], math.inf)
        buckets = {}
        for start, end in zip(starts, ends, strict=True):
            inside = (self.positions >= start) & (self.positions < end)
            if inside.any():
                label = f"{start}+" if end == math.inf else f"{start}-{end - 1}"
                names = ("kl", "agreement", "ce", "teacher_ce")
                means = {name: float(values[name][inside].mean()) for name in names}
                logs = means.pop("ce"), means.pop("teacher_ce")
                buckets[label] = {"tokens": int(inside.sum()), **means, **_perplexities(*logs)}
        return buckets


def _perplexities(ce: float, teacher_ce: float) -> dict[str, float]:
    return {
        "perplexity": _exp(ce),
        "teacher_perplexity": _exp(teacher_ce),
        "perplexity_ratio": _exp(ce - teacher_ce),
    }


def _exp(value: float) -> float:
    # a broken student may be beyond what exp can hold: infinite, not an error
    with np.errstate(over="ignore"):
        return float(np.exp(value))
