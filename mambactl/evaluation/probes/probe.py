"""A row of the table of probes, and what the probes of one run share."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, TypeAlias, TypeVar, cast

from mambactl import console, metrics
from mambactl.errors import UsageError
from mambactl.json_values import JsonObject
from mambactl.metrics import Metric, Numbers
from mambactl.options.evaluation import EvalOptions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from mambactl.data.format import Rules
    from mambactl.data.sources import Document
    from mambactl.evaluation.fidelity import Variant
    from mambactl.evaluation.statistics import Bootstrap
    from mambactl.generation.dealer import Dealer
    from mambactl.models.hybrid import HybridForCausalLM

STUDENT, AGAINST, TEACHER = "student", "against", "teacher"

Options = TypeVar("Options", bound=EvalOptions)
Inputs = TypeVar("Inputs")
Found = TypeVar("Found")
# data set -> student, teacher or control -> numbers
ByVariant = Mapping[str, Mapping[str, Numbers]]


@dataclass
class Asked:
    """A run before its models are loaded; what several probes read is read once.

    `longest` is the longest text that some probe has made.
    """

    source: str
    config: EvalOptions
    teacher: str | None = None
    longest: int = field(default=0, init=False)

    @cached_property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The tokenizer of the model."""
        from mambactl.checkpoint.load import load_tokenizer

        return load_tokenizer(self.source, self.config.trust_remote_code)

    @cached_property
    def rules(self) -> "Rules":
        """Rules for rows: tokens outside the model's vocabulary are refused."""
        from mambactl.checkpoint.vocabulary import vocabulary_size
        from mambactl.data.format import Rules

        size = vocabulary_size(self.source, self.config.trust_remote_code)
        return Rules(vocabulary=size)

    @cached_property
    def texts(self) -> "dict[str, list[Document]]":
        """Rows of --data by data set."""
        from mambactl.data.sources import load_rows, set_names

        specs = self.config.data
        names = zip(set_names(specs), specs, strict=True)
        return {name: load_rows([spec], self.config.limit) for name, spec in names}


def _alone() -> "Dealer":
    from mambactl.generation.dealer import ALONE

    return ALONE


@dataclass(frozen=True)
class Subject:
    """The models of a run, and the dealer of its batches; `variants` are students and controls."""

    source: str
    tokenizer: "PreTrainedTokenizerBase"
    model: "HybridForCausalLM"
    variants: Mapping[str, "Variant"]
    teacher_name: str | None = None
    teacher: "HybridForCausalLM | None" = None
    other_name: str | None = None
    other: "HybridForCausalLM | None" = None
    dealer: "Dealer" = field(default_factory=_alone)

    @property
    def models(self) -> dict[str, "HybridForCausalLM"]:
        """Student, the one it is tested against, and the teacher, where it is another model."""
        teacher = None if self.teacher is self.model else self.teacher
        every = {STUDENT: self.model, AGAINST: self.other, TEACHER: teacher}
        return {name: model for name, model in every.items() if model is not None}

    @property
    def rules(self) -> "Rules":
        """Rules for rows: tokens outside the model's vocabulary are refused."""
        from mambactl.data.format import Rules

        return Rules(vocabulary=self.model.config.vocab_size)

    def alone(self) -> "Subject":
        """Student and teacher without the others, which are then free."""
        student = {STUDENT: self.variants[STUDENT]}
        return replace(self, variants=student, other=None)


class Probe(Generic[Options, Inputs, Found]):
    """One thing that `eval` measures: a subclass in a file of its own, and a row of the table.

    Results are kept under `name`, by data set. `title` and `about` head its section of a page;
    `group` heads its columns where all models are compared; `by_set` gives every data set columns
    under a heading of its own. `own` are numbers that `METRICS` does not hold.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    about: ClassVar[str] = ""
    group: ClassVar[str] = ""
    by_set: ClassVar[bool] = False
    # plain classes whose annotated fields become options
    options: ClassVar[tuple[type, ...]] = ()
    own: ClassVar[tuple[Metric, ...]] = ()
    # how it is asked for, in a hint
    example: ClassVar[str] = ""
    teacher: ClassVar[Literal["needed", "welcome", "unused"]] = "needed"
    # controls are measured as well
    controlled: ClassVar[bool] = False
    # it goes last, when all models but student and teacher are free
    alone: ClassVar[bool] = False
    # modules that it needs and that not every installation has
    packages: ClassVar[tuple[str, ...]] = ()
    # the probe without which it is never asked for
    within: ClassVar[str] = ""
    # --fail-under knows its numbers
    bounded: ClassVar[bool] = True

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """Every number of the probe."""
        return (*metrics.group(self.name), *self.own)

    @property
    def bounds(self) -> list[str]:
        """The numbers that may have a bound."""
        return [each.name for each in self.metrics if each.bound and self.bounded]

    def asked(self, config: Options) -> bool:
        """True if the options ask for this probe."""
        raise NotImplementedError

    def validate(self, config: Options) -> None:
        """Refuse options that contradict each other, also where it is not asked for."""

    def read(self, config: Options, asked: Asked) -> Inputs:
        """Read and check everything before a model is loaded; by data set if nothing else."""
        raise NotImplementedError

    def match(self, config: Options, asked: Asked) -> None:
        """Refuse models that cannot be compared, now that the teacher is known."""

    def plan(self, inputs: Inputs | None) -> JsonObject:
        """Description of the probe in a dry run; `inputs` is None where it is not asked for."""
        return {}

    def labels(self, inputs: Inputs) -> list[str]:
        """Parts that the probe adds to the name of the results."""
        # by data set, unless a probe says otherwise
        return list(cast(Mapping[str, object], inputs))

    def known(self, inputs: Inputs, teacher: str | None) -> dict[str, Sequence[str]] | None:
        """Data set -> numbers that may have a bound; None where only the measurement knows.

        Without a `teacher` nothing is compared with one.
        """
        return dict.fromkeys(self.labels(inputs), self.bounds) if self.bounds else {}

    def measure(self, config: Options, inputs: Inputs, subject: Subject) -> Found:
        """Measure; numbers by data set if nothing else."""
        raise NotImplementedError

    def show(self, subject: Subject, found: Found) -> None:
        """Print a table: a line per data set."""
        by_set = cast(Mapping[str, Numbers], found)
        numbers = list(self.present(by_set.values()))
        against = f" against {subject.teacher_name}" if self.teacher == "needed" else ""
        lines = [(name, *(each.shown(one) for each in numbers)) for name, one in by_set.items()]
        headings = (each.label or each.name for each in numbers)
        console.table(f"{self.name} of {subject.source}{against}", ("set", *headings), lines)

    def keep(self, kept: Numbers, found: Found) -> None:
        """Put the numbers where results are kept."""
        kept[self.name] = found

    def draw(self, config: Options, source: str, kept: Numbers, path: Path | None) -> None:
        """Make files of the results at `path` beside them; None where none are kept."""

    def scores(self, kept: Numbers) -> dict[str, dict[str, float]]:
        """Data set -> number -> value, of all that may have a bound; NaN for one without value."""
        return {
            name: {key: bounded(found[key]) for key in self.bounds if key in found}
            for name, found in kept.get(self.name, {}).items()
            if self.bounds
        }

    def present(self, found: Iterable[Numbers]) -> Iterator[Metric]:
        """The numbers that some data set has."""
        every = list(found)
        return (each for each in self.metrics if any(each.name in one for one in every))


def bootstrap_of(config: EvalOptions) -> "Bootstrap":
    """Settings of the bootstrap for intervals and tests."""
    from mambactl.evaluation.statistics import Bootstrap

    return Bootstrap(config.confidence, config.bootstrap, config.seed)


def interval_heading(found: Iterable[Numbers]) -> str:
    """The heading of intervals, which some of the numbers have, all of the same share."""
    share = next(one["confidence"] for one in found if "confidence" in one)
    return f"{100 * share:g} % interval"


def bounded(value: float | None) -> float:
    """A number as a bound sees it: one that has no value is within none."""
    return math.nan if value is None else value


def keep_by_variant(kept: Numbers, kind: str, measured: ByVariant) -> None:
    """Keep the student's numbers under `kind`, those of others beside it or under `controls`."""
    own = kept.setdefault(kind, {})
    for data, found in measured.items():
        for name, numbers in found.items():
            if name == STUDENT:
                own[data] = dict(numbers)
            elif name == TEACHER:
                own[data][TEACHER] = numbers
            elif name == AGAINST:
                kept[AGAINST].setdefault(kind, {})[data] = dict(numbers)
            else:
                controls = kept.setdefault("controls", {}).setdefault(name, {})
                controls.setdefault(kind, {})[data] = numbers


def require_text(asked: bool, config: EvalOptions) -> None:
    """Raise UsageError for a comparison on text without any."""
    if asked and not config.data:
        raise UsageError("--against and --per-layer compare on text", "add --data FILE")


# a row of the table, whose options, inputs and results are its own
AnyProbe: TypeAlias = Probe[Any, Any, Any]
