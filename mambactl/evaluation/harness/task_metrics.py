"""Metrics of a task among its scores: all of them, and the one that it is known by."""

from mambactl.json_values import AnyObject
from mambactl.metrics import MAIN


def main_metric(scores: AnyObject) -> str | None:
    """The metric that a task is known by."""
    named = [key for key in MAIN if scores.get(key) is not None]
    return next(iter(named + metrics_of(scores)), None)


def metrics_of(scores: AnyObject) -> list[str]:
    """Names of a task's scores, without their errors."""
    return [
        key for key, value in scores.items()
        if isinstance(value, int | float) and "stderr" not in key
    ]  # fmt: skip
