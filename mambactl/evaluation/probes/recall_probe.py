"""`eval --recall`: recall of pairs that were stated once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pydantic import Field

from mambactl import console
from mambactl.bounds import BATCH_ROWS
from mambactl.evaluation.probes.probe import (
    STUDENT,
    TEACHER,
    Asked,
    Numbers,
    Probe,
    Subject,
    bootstrap_of,
    interval_heading,
    keep_by_variant,
)
from mambactl.json_values import AnyObject, JsonObject
from mambactl.metrics import (
    LEAST_RECALL_RATIO,
    MEAN_RECALL_RATIO,
    RECALL_RATIO,
    RECALL_RATIOS,
    Metric,
    exact,
    span,
)
from mambactl.options.evaluation import EvalOptions, rows_per_pass
from mambactl.options.fields import Lengths

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from mambactl.evaluation.fidelity import Variant
    from mambactl.evaluation.recall import RecallProbe as Rows
    from mambactl.evaluation.statistics import Bootstrap
    from mambactl.generation.dealer import Dealer

# numbers of one probe's rows, and of all probes together
COMPARED = (RECALL_RATIO, *RECALL_RATIOS)


class RecallOptions(EvalOptions):
    """Rows that are made."""

    recall: Lengths = Field([], description="row lengths of generated recall probes, 1024,4096 say")
    recall_rows: int = Field(8, ge=1, le=BATCH_ROWS.most, description="rows per recall probe")


@dataclass(frozen=True)
class Recalled:
    """Probe -> variant or teacher -> numbers, and the rows that they are of.

    `ratios` are numbers of all probes together by variant, where there is a teacher.
    """

    measured: dict[str, dict[str, Numbers]]
    rows: "dict[str, Rows]"
    ratios: dict[str, Numbers] = field(default_factory=dict)


class RecallProbe(Probe[RecallOptions, "dict[str, Rows]", Recalled]):
    """Recall by form and length of the row."""

    name, title, group = "recall", "Recall", "recall"
    about = (
        "Pairs stated once in a row and asked for at its end, made from a seed; ratios to the "
        "teacher's recall of the same rows."
    )
    options = (RecallOptions,)
    example = "--recall 1024"
    teacher = "welcome"
    controlled = True

    def asked(self, config: RecallOptions) -> bool:
        """True if there are lengths."""
        return bool(config.recall)

    def read(self, config: RecallOptions, asked: Asked) -> "dict[str, Rows]":
        """Make the rows; raises UsageError where they do not fit."""
        from mambactl.evaluation.recall import recall_probes

        made = recall_probes(asked.tokenizer, config.recall, config.recall_rows, config.seed)
        return {rows.name: rows for rows in made}

    def plan(self, inputs: "dict[str, Rows] | None") -> JsonObject:
        """Rows, and what guessing would get."""
        made = (inputs or {}).items()
        return {
            self.name: {
                name: {"rows": len(rows.input_ids), "chance": rows.chance} for name, rows in made
            }
        }

    def known(self, inputs: "dict[str, Rows]", teacher: str | None) -> dict[str, Sequence[str]]:
        """Numbers of every probe; with a teacher ratios, also those of all probes together."""
        own = [name for name in self.bounds if name not in {each.name for each in COMPARED}]
        if teacher is None:
            return dict.fromkeys(inputs, own)
        every = [each.name for each in RECALL_RATIOS]
        known: dict[str, Sequence[str]] = dict.fromkeys(inputs, [*own, RECALL_RATIO.name])
        return known | {self.name: every}

    def measure(
        self, config: RecallOptions, inputs: "dict[str, Rows]", subject: Subject
    ) -> Recalled:
        """Measure students, controls and the teacher, and compare them row by row."""
        from mambactl.evaluation.fidelity import Variant
        from mambactl.evaluation.recall import recalled_by_row, summarise_answers

        models = dict(subject.variants)
        if subject.teacher is not None and subject.teacher is not subject.model:
            models[TEACHER] = Variant(subject.teacher)
        measured: dict[str, dict[str, Numbers]] = {name: {} for name in inputs}
        by_row: dict[str, list[np.ndarray]] = {name: [] for name in models}
        found = _answers(inputs, models, rows_per_pass(config), subject.dealer)
        for (data, name), answers in found.items():
            rows = inputs[data]
            kept: Numbers = {**summarise_answers(answers, rows.width)}
            measured[data][name] = kept
            by_row[name].append(recalled_by_row(answers, rows))
            if config.save_samples:
                kept["samples"] = {"recalled": by_row[name][-1].tolist()}
        result = Recalled(measured, inputs)
        if subject.teacher is not None:
            # a model is its own teacher where no other one was measured
            theirs = by_row.pop(TEACHER, by_row[STUDENT])
            for name, ours in by_row.items():
                result.ratios[name] = _compare(result, name, ours, theirs, bootstrap_of(config))
        return result

    def show(self, subject: Subject, found: Recalled) -> None:
        """Print a line per model; the recall of a guess opens a probe's lines.

        A second table has ratios to the teacher's recall.
        """
        every = [numbers for models in found.measured.values() for numbers in models.values()]
        numbers = [each for each in self.present(every) if each is not RECALL_RATIO]
        lines = []
        for data, models in found.measured.items():
            chance = exact(found.rows[data].chance)
            lines.append((data, "chance", chance, *("" for _ in numbers[1:])))
            lines += [
                ("", model, *(each.shown(one) for each in numbers)) for model, one in models.items()
            ]
        headings = ("probe", "model", *(each.name for each in numbers))
        console.table(f"recall of {subject.source}", headings, lines)
        if found.ratios:
            _show_ratios(subject, found)

    def keep(self, kept: Numbers, found: Recalled) -> None:
        """Put facts of the rows beside the student's numbers."""
        together = {self.name: found.ratios} if found.ratios else {}
        keep_by_variant(kept, self.name, found.measured | together)
        for data, rows in found.rows.items():
            about = {"chance": rows.chance, "pairs": rows.pairs, "queries": rows.queries}
            kept[self.name][data] |= about


def _answers(
    probes: "Mapping[str, Rows]", models: "Mapping[str, Variant]", batch_size: int, dealer: "Dealer"
) -> "dict[tuple[str, str], Tensor]":
    """Answers [n, 2] of every model to every probe, by the names of both."""
    import torch

    from mambactl.evaluation.recall import read_rows

    # all at once: the rows of one probe are too few for many processes
    jobs = [
        (data, name, batch)
        for data, rows in probes.items()
        for name in models
        for batch in rows.batches(batch_size)
    ]

    def measure(job: "tuple[str, str, tuple[Tensor, Tensor]]") -> "Tensor":
        variant = models[job[1]]
        with variant.during():
            return read_rows(variant.model, job[2])

    with console.progress(RecallProbe.name, len(jobs)) as task:
        found = dealer.results(jobs, measure, task.advance)
    parts: dict[tuple[str, str], list[Tensor]] = {}
    for (data, name, _), part in zip(jobs, found, strict=True):
        parts.setdefault((data, name), []).append(part)
    return {names: torch.cat(each) for names, each in parts.items()}


def _compare(
    found: Recalled,
    name: str,
    ours: "Sequence[np.ndarray]",
    theirs: "Sequence[np.ndarray]",
    bootstrap: "Bootstrap",
) -> Numbers:
    """Put the ratios of a variant beside its other numbers; return those of all probes together.

    `ours` and `theirs` are the recalled values of every row, probe by probe.
    """
    from mambactl.evaluation.statistics import ratios

    result = ratios(ours, theirs, bootstrap)
    certainty = {"confidence": bootstrap.confidence, "bootstrap": bootstrap.replicates}
    own: dict[str, float] = {}
    for data, each in zip(found.measured, result.each, strict=True):
        numbers = found.measured[data][name]
        numbers |= {RECALL_RATIO.name: each.value, **certainty}
        numbers["intervals"] = {RECALL_RATIO.name: each.interval}
        if each.value is not None:
            own[data] = each.value
    least = min(own, key=own.__getitem__, default=None)
    interval = result.mean.interval
    values = (result.mean.value, interval and interval[0], None if least is None else own[least])
    return {
        **{each.name: value for each, value in zip(RECALL_RATIOS, values, strict=True)},
        "least_probe": least,
        "probes": len(own),
        **certainty,
        "resampled": "rows",
        "intervals": {MEAN_RECALL_RATIO.name: interval},
    }


def _show_ratios(subject: Subject, found: Recalled) -> None:
    """Print ratios and intervals of every probe, then the mean and the least of all, by model."""
    lines = [
        (data, name, *_written(models[name], RECALL_RATIO))
        for data, models in found.measured.items()
        for name in found.ratios
    ]
    for name, numbers in found.ratios.items():
        lines += [
            (f"mean of {numbers['probes']}", name, *_written(numbers, MEAN_RECALL_RATIO)),
            ("least", name, LEAST_RECALL_RATIO.shown(numbers), numbers["least_probe"] or "-"),
        ]
    columns = ("probe", "model", "ratio", interval_heading(found.ratios.values()))
    title = f"recall of {subject.source} over that of {subject.teacher_name}"
    console.table(title, columns, lines)


def _written(numbers: AnyObject, metric: Metric) -> tuple[str, str]:
    return metric.shown(numbers), span(numbers["intervals"][metric.name], exact) or "-"
