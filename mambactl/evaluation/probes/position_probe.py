"""`eval --long-context-data`: perplexity and KL by position in long text."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import Field

from mambactl import console
from mambactl.errors import UsageError
from mambactl.evaluation.probes.probe import (
    STUDENT,
    TEACHER,
    Asked,
    Numbers,
    Probe,
    Subject,
    bootstrap_of,
)
from mambactl.json_values import JsonObject
from mambactl.metrics import (
    AGREEMENT,
    KL,
    PERPLEXITY,
    PERPLEXITY_RATIO,
    TEACHER_PERPLEXITY,
    TOKENS,
)
from mambactl.options.evaluation import EvalOptions
from mambactl.options.fields import DataSpecs, Tokens

if TYPE_CHECKING:
    import numpy as np

# what `position_length` may be
SHORTEST = 128
SHOWN = (TOKENS, KL, AGREEMENT, PERPLEXITY, TEACHER_PERPLEXITY, PERPLEXITY_RATIO)
Rows = dict[str, "list[np.ndarray]"]


class PositionOptions(EvalOptions):
    """Rows of long text."""

    long_context_data: DataSpecs = Field([], description="perplexity by position in long text")
    position_length: Tokens = Field(8192, ge=SHORTEST, description="tokens per row of it")
    position_rows: int = Field(8, ge=1, description="rows of it, from documents in turn")


class PositionProbe(Probe[PositionOptions, Rows, Numbers]):
    """Fidelity by data set and student, with means by position."""

    name, title = "long_context", "Long context"
    options = (PositionOptions,)
    bounded = False

    def asked(self, config: PositionOptions) -> bool:
        """True if there is long text."""
        return bool(config.long_context_data)

    def read(self, config: PositionOptions, asked: Asked) -> Rows:
        """Cut the rows; raises UsageError where no document is long enough."""
        from mambactl.data.sources import set_names

        specs = config.long_context_data
        names = zip(set_names(specs), specs, strict=True)
        rows = {name: _long_rows(config, spec, asked) for name, spec in names}
        asked.longest = max(asked.longest, config.position_length)
        return rows

    def plan(self, inputs: Rows | None) -> JsonObject:
        """Rows of every data set."""
        if inputs is None:
            return {}
        return {self.name: {name: len(rows) for name, rows in inputs.items()}}

    def labels(self, inputs: Rows) -> list[str]:
        """The data sets, which may be those of --data as well."""
        return [f"long-{name}" for name in inputs]

    def measure(self, config: PositionOptions, inputs: Rows, subject: Subject) -> Numbers:
        """Measure every student."""
        return {name: _positions(config, rows, subject) for name, rows in inputs.items()}

    def show(self, subject: Subject, found: Numbers) -> None:
        """Print a table per data set and student."""
        for data, students in found.items():
            for name in subject.models:
                if name in students:
                    _show(f"{subject.source}, {name}, on {data} by position", students[name])


def _long_rows(config: PositionOptions, spec: str, asked: Asked) -> "list[np.ndarray]":
    """Whole rows only, so that every position is measured on the same documents."""
    from mambactl.data.format import encode_rows
    from mambactl.data.sources import load_rows

    size = config.position_length
    examples = encode_rows(load_rows([spec], config.limit), asked.tokenizer, rules=asked.rules)
    documents = [example.input_ids for example in examples]
    most = max(map(len, documents))
    # one row of each document, then the second of each
    starts = range(0, most - size + 1, size)
    rows = [ids[at : at + size] for at in starts for ids in documents if len(ids) >= at + size]
    if not rows:
        raise UsageError(
            f"{spec}: the longest document has {most} tokens, asked was for {size}",
            f"--position-length {most}, or longer text" if most >= SHORTEST else "give longer text",
        )
    return rows[: config.position_rows]


def _positions(config: PositionOptions, rows: "Sequence[np.ndarray]", subject: Subject) -> Numbers:
    from mambactl.evaluation.fidelity import Variant, predict
    from mambactl.evaluation.predictions import LONG_BUCKET_STARTS

    models = subject.models
    students = {name: Variant(model) for name, model in models.items() if name != TEACHER}
    guide = models.get(TEACHER, models[STUDENT])
    # one row at a time: it is long enough to fill a device
    size = config.position_length
    found = predict(students, guide, rows, size, batch_size=1, dealer=subject.dealer)
    about = {"rows": len(rows), "max_length": size}
    bootstrap = bootstrap_of(config)
    return about | {
        name: found.summary(name, bootstrap, LONG_BUCKET_STARTS, config.save_samples)
        for name in students
    }


def _show(title: str, found: Numbers) -> None:
    parts = {**found["by_position"], "all": found}
    lines = [(label, *(each.shown(part) for each in SHOWN)) for label, part in parts.items()]
    console.table(title, ("position", *(each.label for each in SHOWN)), lines)
