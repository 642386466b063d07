"""Scores of a student beside its teacher's, document by document."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mambactl.evaluation.harness.presets import PRESETS
from mambactl.evaluation.harness.task_metrics import TaskScores, main_metric
from mambactl.evaluation.statistics import Bootstrap, estimate, mean_difference_of
from mambactl.json_values import JsonObject
from mambactl.present import present


@dataclass(frozen=True)
class _Pairs:
    """A task's score of student and teacher, and its documents' (1, ours, theirs) [N, 3].

    Without documents where the score is no mean over them.
    """

    metric: str
    scores: tuple[float, float]
    documents: np.ndarray | None


def compare_scores(
    ours: TaskScores, theirs: TaskScores, presets: Sequence[str], bootstrap: Bootstrap
) -> JsonObject:
    """Compare two models by task: scores by its main metric (a preset's own), difference, interval.

    `mean` has the same of the mean over the tasks whose score is a mean over documents; documents
    are drawn within each task, the same of student and teacher. Parts of a group are that group.
    """
    chosen = {
        task: column.metric
        for preset in presets
        for column in PRESETS[preset]
        for task in column.tasks
    }
    pairs = dict(_pairs(ours, theirs, chosen))
    paired = {name: each for name, each in pairs.items() if each.documents is not None}
    found = estimate(
        [present(each.documents) for each in paired.values()], mean_difference_of, bootstrap
    )
    intervals = dict(zip(paired, (each.interval for each in found.each), strict=True))
    result: JsonObject = {
        "confidence": bootstrap.confidence,
        "bootstrap": bootstrap.replicates,
        "resampled": "documents",
        "by_task": {
            name: _numbers(each.scores, intervals.get(name))
            | {"metric": each.metric}
            | ({} if each.documents is None else {"documents": len(each.documents)})
            for name, each in pairs.items()
        },
    }
    if paired:
        mine, guide = (float(np.mean([e.scores[i] for e in paired.values()])) for i in (0, 1))
        result["mean"] = _numbers((mine, guide), found.mean.interval) | {"tasks": len(paired)}
    return result


def _numbers(scores: tuple[float, float], interval: list[float] | None) -> JsonObject:
    ours, theirs = scores
    return {"student": ours, "teacher": theirs, "difference": ours - theirs, "interval": interval}


def _pairs(
    ours: TaskScores, theirs: TaskScores, chosen: Mapping[str, str]
) -> Iterator[tuple[str, _Pairs]]:
    parts = {part for found in ours.groups.values() for part in found}
    for name, scores in ours.metrics.items():
        others = theirs.metrics.get(name, {})
        metric = chosen.get(name)
        if metric not in scores:
            metric = main_metric(scores)
        if name in parts or metric is None or metric not in others:
            continue
        both = (scores[metric], others[metric])
        yield name, _Pairs(metric, both, _documents(ours, theirs, name, metric, both))


def _documents(
    ours: TaskScores, theirs: TaskScores, name: str, metric: str, scores: tuple[float, float]
) -> np.ndarray | None:
    """(1, ours, theirs) of every document [N, 3], None where scores are no means over them."""
    rows = []
    for leaf in _leaves(name, ours.groups):
        mine, other = (each.documents.get(leaf, {}).get(metric, {}) for each in (ours, theirs))
        if not mine or mine.keys() != other.keys():
            return None
        rows += [(1.0, value, other[document]) for document, value in mine.items()]
    found = np.array(rows)
    return found if np.allclose(found[:, 1:].mean(0), scores, rtol=0, atol=1e-6) else None


def _leaves(name: str, groups: Mapping[str, Iterable[str]]) -> Iterator[str]:
    if name not in groups:
        yield name
        return
    for part in groups[name]:
        yield from _leaves(part, groups)
