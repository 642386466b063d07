"""`eval --data`: fidelity of students and their controls to the teacher on text."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mambactl import console
from mambactl.evaluation.probes.probe import (
    AGAINST,
    STUDENT,
    Asked,
    Numbers,
    Probe,
    Subject,
    bootstrap_of,
    interval_heading,
    keep_by_variant,
    require_text,
)
from mambactl.json_values import JsonObject
from mambactl.metrics import AGREEMENT, KL, Metric, exact, signed, significant, span
from mambactl.options.evaluation import EvalOptions, rows_per_pass
from mambactl.present import present

if TYPE_CHECKING:
    from mambactl.data.sources import Document

Texts = dict[str, "list[Document]"]
# whose means by position are shown
BY_POSITION = (KL, AGREEMENT)


@dataclass
class Fidelity:
    """Numbers of every variant by data set, and paired tests."""

    measured: dict[str, dict[str, Numbers]] = field(default_factory=dict)
    tests: dict[str, Numbers] = field(default_factory=dict)


class FidelityProbe(Probe[EvalOptions, Texts, Fidelity]):
    """Differences of whole distributions, token by token."""

    name, title = "fidelity", "Fidelity to the teacher"
    about = (
        "ECE: how far a model's confidence in its first choice is from how often that is the "
        "text's next token, or from what the teacher gives it."
    )
    by_set = True
    example = "--data FILE (fidelity to the teacher)"
    controlled = True

    def asked(self, config: EvalOptions) -> bool:
        """True if there is text."""
        return bool(config.data)

    def validate(self, config: EvalOptions) -> None:
        """Raise UsageError for a second student without text."""
        require_text(bool(config.against), config)

    def read(self, config: EvalOptions, asked: Asked) -> Texts:
        """Rows by data set."""
        return asked.texts

    def plan(self, inputs: Texts | None) -> JsonObject:
        """Documents of every data set."""
        return {"documents": {name: len(rows) for name, rows in (inputs or {}).items()}}

    def measure(self, config: EvalOptions, inputs: Texts, subject: Subject) -> Fidelity:
        """Measure every variant on every data set; the other student is tested as well."""
        from mambactl.data.format import encode_rows
        from mambactl.evaluation.fidelity import predict

        found, bootstrap = Fidelity(), bootstrap_of(config)
        for name, rows in inputs.items():
            documents = [
                example.input_ids
                for example in encode_rows(rows, subject.tokenizer, rules=subject.rules)
            ]
            sizes = (config.max_length, rows_per_pass(config))
            predictions = predict(
                subject.variants,
                present(subject.teacher),
                documents,
                *sizes,
                dealer=subject.dealer,
            )
            counts = {
                "documents": len(documents),
                "rows": predictions.row_count,
                "max_length": config.max_length,
            }
            samples = config.save_samples
            found.measured[name] = {
                variant: counts | predictions.summary(variant, bootstrap, samples=samples)
                for variant in subject.variants
            }
            if AGAINST in subject.variants:
                found.tests[name] = predictions.compare(STUDENT, AGAINST, bootstrap)
        return found

    def show(self, subject: Subject, found: Fidelity) -> None:
        """Print a table per data set where variants differ, and one of the tests."""
        title = f"{subject.source} against {subject.teacher_name}"
        if all(len(variants) == 1 for variants in found.measured.values()):
            alone = {data: next(iter(one.values())) for data, one in found.measured.items()}
            self._table(f"{title}, per token", alone)
        else:
            for data, variants in found.measured.items():
                self._table(f"{title} on {data}, per token", variants)
        _show_tests(subject, found.tests)

    def keep(self, kept: Numbers, found: Fidelity) -> None:
        """Put the tests beside the numbers of the student that they are against."""
        keep_by_variant(kept, self.name, found.measured)
        if found.tests:
            kept.setdefault(AGAINST, {})["tests"] = found.tests

    def _table(self, title: str, columns: Mapping[str, Numbers]) -> None:
        """Print a table whose lines have the names that `fail_under` uses."""
        found = list(columns.values())
        lines = []
        for each in self.present(found):
            lines.append((each.name, *(each.shown(one) for one in found)))
            if each.interval and (cells := _intervals(found, each)):
                lines.append(cells)
        buckets = dict.fromkeys(bucket for one in found for bucket in one["by_position"])
        for each in BY_POSITION:
            for bucket in buckets:
                parts = [one["by_position"].get(bucket) for one in found]
                cells = ("-" if part is None else each.shown(part) for part in parts)
                lines.append((f"{each.name} at {bucket}", *cells))
        console.table(title, ("", *columns), lines)


def _intervals(found: Sequence[Numbers], metric: Metric) -> tuple[str, ...]:
    pairs = [one.get("intervals", {}).get(metric.name) for one in found]
    if not any("intervals" in one for one in found):
        return ()
    return (f"  {interval_heading(found)}", *(span(pair, exact) or "-" for pair in pairs))


def _show_tests(subject: Subject, tests: Mapping[str, Numbers]) -> None:
    """A line per data set and number: the difference, its interval, p, and who wins how often."""
    lines = [
        (
            data,
            name,
            signed(test["difference"]),
            span(test["interval"], signed) or "-",
            "-" if test["p"] is None else significant(test["p"]),
            f"{test['wins']} / {test['losses']}",
        )
        for data, found in tests.items()
        for name, test in found["tests"].items()
    ]
    if lines:
        units = {
            f"{t['tests'][KL.name]['units']} {t['resampled']} of {d}" for d, t in tests.items()
        }
        heading = interval_heading(tests.values())
        columns = ("data", "", "difference", heading, "p", "lower / higher")
        other = subject.other_name
        title = f"{subject.source} minus {other}, by {', '.join(sorted(units))}"
        console.table(title, columns, lines)
