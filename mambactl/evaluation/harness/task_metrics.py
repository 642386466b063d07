"""Metrics of a task among its scores: all of them, and the one that it is known by."""

from collections.abc import Mapping

from mambactl.metrics import MAIN


def main_metric(scores: Mapping[str, object]) -> str | None:
    """The metric that a task is known by."""
    named = [key for key in MAIN if scores.get(key) is not None]
    return next(iter(named + metrics_of(scores)), None)


def metrics_of(scores: Mapping[str, object]) -> list[str]:
    """Names of a task's scores, without their errors."""
    return [
        key for key, value in scores.items()
        if isinstance(value, int | float) and "stderr" not in key
    ]  # fmt: skip
