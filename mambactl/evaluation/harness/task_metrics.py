"""Scores of tasks, and the metrics among them: all of them, and the one a task is known by."""

from dataclasses import dataclass, field

from mambactl.json_values import AnyObject, JsonObject
from mambactl.metrics import MAIN


@dataclass(frozen=True)
class TaskScores:
    """Scores by task and metric, and the harness's own table of them (markdown).

    `samples` are requests and answers by task, and `documents` scores by task, metric and number of
    the document, where they were asked for. `groups` are the parts of tasks that have any.
    """

    metrics: dict[str, dict[str, float]]
    table: str
    samples: dict[str, list[JsonObject]] = field(default_factory=dict)
    groups: dict[str, list[str]] = field(default_factory=dict)
    documents: dict[str, dict[str, dict[int, float]]] = field(default_factory=dict)


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
