"""Bounds on measured numbers: `agreement>=0.6` must hold, or the command fails."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mambactl.errors import UsageError
from mambactl.evaluation.probes import lower_is_better
from mambactl.metrics import MAIN

# group (data set or task) -> metric -> value
Scores = Mapping[str, Mapping[str, float]]

# of the harness, on other scales than shares from 0 to 1; as far as hundreds, some below 0
_NO_SHARES = re.compile(r"(bleu|chrf|rouge)(?!.*_acc$)|likelihood$")
_SIGNED = re.compile(r"(mcc|likelihood|.*_diff)$")

_CHECK = re.compile(r"^\s*(?P<name>[^<>=]+?)\s*(?P<sign>>=|<=|=)\s*(?P<bound>[^<>=]+?)\s*$")
_HINT = "write METRIC>=VALUE (or METRIC=VALUE) to fail below, METRIC<=VALUE to fail above"


@dataclass(frozen=True)
class Check:
    """A bound on one metric, in every group or (`GROUP.METRIC`, `GROUP`) in one."""

    name: str
    at_most: bool
    bound: float

    def __str__(self) -> str:
        return f"{self.name}{'<=' if self.at_most else '>='}{self.bound:g}"

    def concerns(self, group: str, metric: str, metrics: Sequence[str]) -> bool:
        """True if the bound is on one metric of a group that has `metrics`."""
        main = next((name for name in MAIN if name in metrics), None)
        named = {metric, f"{group}.{metric}"}
        return self.name in (named | {group} if metric == main else named)

    def holds(self, value: float) -> bool:
        """True if a value is within the bound; NaN never is."""
        return value <= self.bound if self.at_most else value >= self.bound


def is_share(metric: str) -> bool:
    """True if a score is a fraction of 1, which may be written in per cent."""
    name = metric.partition(":")[0]
    return not (lower_is_better(name) or _NO_SHARES.match(name))


def may_be_negative(metric: str) -> bool:
    """True if a score may be below 0."""
    return bool(_SIGNED.match(metric.partition(":")[0]))


def parse_checks(texts: Sequence[str]) -> list[Check]:
    """Read METRIC>=VALUE, METRIC=VALUE (at least) and METRIC<=VALUE; raises UsageError."""
    return [_parse(text) for text in texts]


def require_known(checks: Sequence[Check], known: Mapping[str, Sequence[str]]) -> None:
    """Raise UsageError for a check about no metric of `known` (group -> metrics)."""
    for check in checks:
        if not any(
            check.concerns(group, metric, metrics)
            for group, metrics in known.items()
            for metric in metrics
        ):
            names = dict.fromkeys(metric for metrics in known.values() for metric in metrics)
            raise UsageError(
                f"--fail-under {check}: nothing called {check.name} is measured here",
                hint=f"known are {', '.join(names)}, also as NAME.METRIC for {', '.join(known)}",
            )


def failures(checks: Sequence[Check], scores: Scores) -> list[str]:
    """One sentence for every bound that does not hold."""
    return [
        f"{group}.{metric} is {value:.4g}, asked was {'<=' if check.at_most else '>='} "
        f"{check.bound:g}"
        for check in checks
        for group, metrics in scores.items()
        for metric, value in metrics.items()
        if check.concerns(group, metric, list(metrics)) and not check.holds(value)
    ]


def _parse(text: str) -> Check:
    match = _CHECK.match(text)
    try:
        bound = float(match["bound"]) if match else None
    except ValueError:
        bound = None
    if match is None or bound is None:
        raise UsageError(f"--fail-under {text}: not a bound on a metric", hint=_HINT)
    name, sign = match["name"], match["sign"]
    if sign == "=" and lower_is_better(name.split(".")[-1]):
        raise UsageError(
            f"--fail-under {text}: {name} is better when lower, and = means at least",
            hint=f"write {name}<={match['bound']} to fail above, {name}>= to fail below",
        )
    return Check(name, sign == "<=", bound)
