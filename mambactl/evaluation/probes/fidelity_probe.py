"""The fidelity part of `eval`: intervals, a second student beside the first, errors by layer."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mambactl import console
from mambactl.data.format import encode_rows
from mambactl.evaluation.fidelity import Variant, predict
from mambactl.evaluation.layers import layer_errors
from mambactl.evaluation.statistics import Bootstrap
from mambactl.models.hybrid import HybridForCausalLM
from mambactl.options import EvalConfig

STUDENT, AGAINST = "student", "against"


@dataclass
class Fidelity:
    """By data set: numbers of every variant, paired tests, and errors by student and layer."""

    measured: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    tests: dict[str, dict[str, Any]] = field(default_factory=dict)
    layers: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)

    def keep(self, metrics: dict[str, Any]) -> None:
        """Put tests and layers where the other numbers of a model are."""
        if self.tests:
            metrics.setdefault(AGAINST, {})["tests"] = self.tests
        for data, found in self.layers.items():
            for name, errors in found.items():
                place = metrics if name == STUDENT else metrics.setdefault(AGAINST, {})
                place.setdefault("layers", {})[data] = errors


def bootstrap_of(config: EvalConfig) -> Bootstrap:
    """How intervals and tests are made."""
    return Bootstrap(config.confidence, config.bootstrap, config.seed)


def measure_fidelity(
    config: EvalConfig,
    data: Mapping[str, list[dict[str, Any]]],
    variants: Mapping[str, Variant],
    teacher: HybridForCausalLM,
    tokenizer: Any,
) -> Fidelity:
    """Measure every variant on every data set; a student called `against` is tested as well."""
    found, bootstrap = Fidelity(), bootstrap_of(config)
    for name, rows in data.items():
        documents = [example.input_ids for example in encode_rows(rows, tokenizer)]
        sizes = (config.max_length, config.rows)
        predictions = predict(variants, teacher, documents, *sizes)
        counts = {
            "documents": len(documents),
            "rows": predictions.row_count,
            "max_length": config.max_length,
        }
        found.measured[name] = {
            variant: counts | predictions.summary(variant, bootstrap, samples=config.save_samples)
            for variant in variants
        }
        if AGAINST in variants:
            found.tests[name] = predictions.compare(STUDENT, AGAINST, bootstrap)
        if config.per_layer:
            found.layers[name] = {
                who: {
                    str(layer): error
                    for layer, error in layer_errors(
                        variants[who].model, teacher, documents, *sizes
                    ).items()
                }
                for who in (STUDENT, AGAINST)
                if who in variants
            }
    return found


def show_tests(source: str, other: str, tests: Mapping[str, dict[str, Any]]) -> None:
    """A line per data set and number: the difference, its interval, p, and who wins how often."""
    lines = []
    for data, found in tests.items():
        for name, test in found["tests"].items():
            interval = test["interval"]
            lines.append(
                (
                    data,
                    name,
                    f"{test['difference']:+.4f}",
                    "-" if interval is None else "{:+.4f} to {:+.4f}".format(*interval),
                    "-" if test["p"] is None else f"{test['p']:.3g}",
                    f"{test['wins']} / {test['losses']}",
                )
            )
    if lines:
        units = {f"{t['tests']['kl']['units']} {t['resampled']} of {d}" for d, t in tests.items()}
        share = next(iter(tests.values()))["confidence"]
        columns = ("data", "", "difference", f"{100 * share:g} % interval", "p", "lower / higher")
        title = f"{source} minus {other}, by {', '.join(sorted(units))}"
        console.table(title, columns, lines)


def show_layers(source: str, layers: Mapping[str, Mapping[str, Mapping[str, float]]]) -> None:
    """A line per replaced layer, a column per data set (and student)."""
    columns = {
        data if who == STUDENT else f"{data} ({who})": errors
        for data, found in layers.items()
        for who, errors in found.items()
    }
    every = sorted({int(layer) for errors in columns.values() for layer in errors})
    lines = [
        (
            str(layer),
            *(f"{e[str(layer)]:.4f}" if str(layer) in e else "-" for e in columns.values()),
        )
        for layer in every
    ]
    if lines:
        title = f"relative error of the mixers of {source}, each fed by the teacher"
        console.table(title, ("layer", *columns), lines)
