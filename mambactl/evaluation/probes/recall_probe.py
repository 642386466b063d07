"""`eval --recall`: what a model recalls of pairs that were stated once."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import Field

from mambactl import console
from mambactl.bounds import BATCH_ROWS
from mambactl.evaluation.probes.probe import (
    TEACHER,
    Asked,
    Numbers,
    Probe,
    Subject,
    keep_by_variant,
)
from mambactl.metrics import exact
from mambactl.options.evaluation import EvalOptions, rows_per_pass
from mambactl.options.fields import Lengths

if TYPE_CHECKING:
    from mambactl.evaluation.recall import RecallProbe as Rows


class RecallOptions(EvalOptions):
    """Rows that are made."""

    recall: Lengths = Field([], description="row lengths of generated recall probes, 1024,4096 say")
    recall_rows: int = Field(8, ge=1, le=BATCH_ROWS.most, description="rows per recall probe")


@dataclass(frozen=True)
class Recalled:
    """Probe -> variant or teacher -> numbers, and the rows that they are of."""

    measured: dict[str, dict[str, Numbers]]
    rows: "dict[str, Rows]"


class RecallProbe(Probe[RecallOptions, "dict[str, Rows]", Recalled]):
    """Recall by form and length of the row."""

    name, title, group = "recall", "Recall", "recall"
    about = "Pairs stated once in a row and asked for at its end, made from a seed."
    options = (RecallOptions,)
    example = "--recall 1024"
    teacher = "welcome"
    controlled = True

    def asked(self, config: RecallOptions) -> bool:
        """Whether there are lengths."""
        return bool(config.recall)

    def read(self, config: RecallOptions, asked: Asked) -> "dict[str, Rows]":
        """Make the rows; raises UsageError where they do not fit."""
        from mambactl.evaluation.recall import recall_probes

        made = recall_probes(asked.tokenizer, config.recall, config.recall_rows, config.seed)
        return {rows.name: rows for rows in made}

    def plan(self, inputs: "dict[str, Rows] | None") -> dict[str, Any]:
        """Rows, and what guessing would get."""
        made = (inputs or {}).items()
        return {
            self.name: {
                name: {"rows": len(rows.input_ids), "chance": rows.chance} for name, rows in made
            }
        }

    def measure(
        self, config: RecallOptions, inputs: "dict[str, Rows]", subject: Subject
    ) -> Recalled:
        """Measure students, controls and the teacher."""
        from mambactl.evaluation.fidelity import Variant
        from mambactl.evaluation.recall import measure_recall

        models = dict(subject.variants)
        if subject.teacher is not None and subject.teacher is not subject.model:
            models[TEACHER] = Variant(subject.teacher)
        measured: dict[str, dict[str, Numbers]] = {name: {} for name in inputs}
        with console.progress(self.name, len(inputs) * len(models)) as task:
            for data, rows in inputs.items():
                for name, variant in models.items():
                    with variant.during():
                        found = measure_recall(variant.model, rows, rows_per_pass(config))
                    measured[data][name] = found
                    task.advance()
        return Recalled(measured, inputs)

    def show(self, subject: Subject, found: Recalled) -> None:
        """Print a line per model; the recall of a guess opens a probe's lines."""
        every = [numbers for models in found.measured.values() for numbers in models.values()]
        numbers = list(self.present(every))
        lines = []
        for data, models in found.measured.items():
            chance = exact(found.rows[data].chance)
            lines.append((data, "chance", chance, *("" for _ in numbers[1:])))
            lines += [
                ("", model, *(each.shown(one) for each in numbers)) for model, one in models.items()
            ]
        headings = ("probe", "model", *(each.name for each in numbers))
        console.table(f"recall of {subject.source}", headings, lines)

    def keep(self, kept: Numbers, found: Recalled) -> None:
        """Put facts of the rows beside the student's numbers."""
        keep_by_variant(kept, self.name, found.measured)
        for data, rows in found.rows.items():
            about = {"chance": rows.chance, "pairs": rows.pairs, "queries": rows.queries}
            kept[self.name][data] |= about
