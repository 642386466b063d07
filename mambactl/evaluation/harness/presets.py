"""The task lists of the paper (arXiv 2408.15237), with their shots and metrics.

Its tables 3 and 4 were made with lm-evaluation-harness, 2,048 tokens of context and no chat
template. "TruthfulQA" of table 3 agrees with the mean of mc1 and mc2, what the harness of that time
printed for the group; table 4 says mc2. GSM8K and CRUX of table 4 were run with ZeroEval, which
asks and reads answers in its own way, so they are not part of the list.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

MAX_LENGTH = 2048


@dataclass(frozen=True)
class Column:
    """One number of a table: the mean of a metric over some tasks of the harness."""

    label: str
    tasks: tuple[str, ...]
    shots: int
    metric: str


def _column(label: str, task: str, metric: str, shots: int = 0) -> Column:
    return Column(label, (task,), shots, metric)


PRESETS: dict[str, tuple[Column, ...]] = {
    "paper-zeroshot": (
        _column("WinoGrande", "winogrande", "acc"),
        _column("PIQA", "piqa", "acc"),
        _column("HellaSwag", "hellaswag", "acc_norm"),
        _column("ARC-Easy", "arc_easy", "acc"),
        _column("ARC-Challenge", "arc_challenge", "acc_norm"),
        _column("MMLU", "mmlu", "acc"),
        _column("OpenBookQA", "openbookqa", "acc_norm"),
        Column("TruthfulQA", ("truthfulqa_mc1", "truthfulqa_mc2"), 0, "acc"),
        _column("PubMedQA", "pubmedqa", "acc"),
        _column("RACE", "race", "acc"),
    ),
    "paper-fewshot": (
        _column("ARC-Challenge", "arc_challenge", "acc_norm", 25),
        _column("HellaSwag", "hellaswag", "acc_norm", 10),
        _column("MMLU", "mmlu", "acc", 5),
        _column("WinoGrande", "winogrande", "acc", 5),
        _column("TruthfulQA", "truthfulqa_mc2", "acc"),
    ),
}


def summary(
    columns: Sequence[Column], scores: Mapping[str, Mapping[str, float]]
) -> dict[str, float | None]:
    """Label -> score, None where a task of it was not measured; `average` over those that were."""
    found: dict[str, float | None] = {}
    for column in columns:
        values = [scores.get(task, {}).get(column.metric) for task in column.tasks]
        given = [value for value in values if value is not None]
        complete = len(given) == len(values)
        found[column.label] = sum(given) / len(given) if complete else None
    known = [value for value in found.values() if value is not None]
    found["average"] = sum(known) / len(known) if known else None
    return found
