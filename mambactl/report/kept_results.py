"""Results and ledgers as files hold them: read once, in the shape that all of a report relies on.

Checked is what somebody reads here; other members of a file are let through.
"""

import math
import reprlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    create_model,
    model_validator,
)

from mambactl.errors import UsageError
from mambactl.foreign import (
    excerpt,
    fitted,
    json_value,
    numbered_lines,
    open_regular,
    read_object,
    reason,
)
from mambactl.json_values import AnyObject, JsonObject
from mambactl.metrics import (
    CONTEXT,
    DECODE_RATE,
    KL,
    MAIN,
    METRICS,
    ROWS,
    Metric,
    last_part,
    yes_or_no,
)

Json = JsonObject

HINT = "give what eval, bench or spec-decode wrote"
LEDGER_HINT = "give metrics.jsonl of a distillation"
# beyond this a number is no measurement, and arithmetic with it overflows
_LARGEST = 1e100

Number = Annotated[float, Field(strict=True)]
Positive = Annotated[float, Field(gt=0, strict=True, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, lt=1 << 62)]
Interval = Annotated[list[Number], Field(min_length=2, max_length=2)]
Digits = Annotated[str, Field(pattern=r"^\d{1,9}$")]
Numbered = Annotated[str, Field(pattern=r"^\d{1,9}(\D|$)")]
_INTERVAL = TypeAdapter(Interval | None)


class _Kept(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)


def _fields(metrics: Iterable[Metric]) -> JsonObject:
    """Numbers that their format can write, by name."""
    words = {last_part: str, str: Any, yes_or_no: Any}
    return {each.name: (words.get(each.write, Number) | None, None) for each in metrics}


def _read_intervals(found: object) -> object:
    """Check the intervals that stand beside their numbers."""
    for name, value in found.items() if isinstance(found, Mapping) else ():
        if name.endswith("_ci"):
            _INTERVAL.validate_python(value)
    return found


class _Measured(_Kept):
    """Numbers of one data set, task or point, with their intervals."""

    chance: Number | None = None
    intervals: dict[str, Interval | None] | None = None

    _read = model_validator(mode="before")(_read_intervals)


_NUMBERS: JsonObject = dict.fromkeys(MAIN, (Number | None, None)) | _fields(
    metric for group in METRICS.values() for metric in group
)


class _Numbers(create_model("_Numbers", __base__=_Measured, **_NUMBERS)):
    """Numbers of the table of metrics."""


class _AtPosition(_Numbers):
    kl: Number


class _Fidelity(_Numbers):
    by_position: dict[Numbered, _AtPosition] = {}


class _LongContext(_Kept):
    max_length: int | None = None
    student: _Fidelity | None = None
    against: _Fidelity | None = None

    @model_validator(mode="after")
    def _has_its_length(self) -> "_LongContext":
        if (self.student or self.against) and self.max_length is None:
            raise ValueError("max_length is missing")
        return self


class _Recalled(_Numbers):
    """Recall of the student, with the teacher's beside it."""

    teacher: _Numbers | None = None


class _Point(_Numbers):
    """A measured speed; what it was measured at is an axis of a chart."""

    model: str | None = None
    decode_byte_limit: Number | None = None

    @model_validator(mode="after")
    def _has_its_axes(self) -> "_Point":
        if getattr(self, DECODE_RATE.name) is not None:
            for axis in (ROWS, CONTEXT):
                _POSITIVE.validate_python(getattr(self, axis.name))
        return self


_POSITIVE = TypeAdapter(Positive)


class _Test(_Kept):
    difference: Number
    interval: Interval | None = None
    p: Number | None = None
    wins: int | None = None
    losses: int | None = None

    @model_validator(mode="after")
    def _has_both_counts(self) -> "_Test":
        if (self.wins is None) != (self.losses is None):
            raise ValueError("wins without losses")
        return self


class _Tests(_Kept):
    tests: dict[str, _Test] = {}


class _Sample(_Kept):
    """Texts of both models for one prompt."""

    prompt: str
    student: str
    teacher: str


class _Written(_Numbers):
    samples: list[_Sample] | None = None


class _Speculative(_Kept):
    accepted_histogram: dict[Digits, Annotated[int, Field(ge=0)]] = {}


class _Config(_Kept):
    synthetic: list[str] | None = None
    draft: str | None = None


def _by_set(found: object) -> object:
    """Fidelity by data set, also where a file has that of a single one without its name."""
    return {"": found} if isinstance(found, Mapping) and KL.name in found else found


def _parts(found: object) -> object:
    """Measurements by name; words and numbers beside them are not read."""
    if not isinstance(found, Mapping):
        return found
    return {name: part for name, part in found.items() if isinstance(part, Mapping)}


def _part(found: object) -> object:
    """The name of a model stands where others have facts about it."""
    return found if isinstance(found, Mapping) else {}


Parts = Annotated[dict[str, _Numbers] | None, BeforeValidator(_parts)]
Points = list[_Point] | None


class _Sequences(_Kept):
    """Bytes of the cache of one sequence, by its tokens."""

    sequences: dict[Digits, _Numbers] | None = None


class _Difference(_Test):
    """Scores of a student and its teacher, and what is between them."""

    student: Number
    teacher: Number
    metric: str | None = None


class _MeanDifference(_Difference):
    tasks: Count


class _Differences(_Kept):
    by_task: dict[str, _Difference] = {}
    mean: _MeanDifference | None = None


class _Metrics(create_model("_Drafts", __base__=_Kept, **_fields(METRICS["drafts"]))):
    """Everything that one run of one stage measured."""

    device: str | None = None
    dtype: str | None = None
    versions: JsonObject | None = None
    config: _Config | None = None
    fidelity: Annotated[dict[str, _Fidelity] | None, BeforeValidator(_by_set)] = None
    long_context: dict[str, _LongContext] | None = None
    layers: dict[str, dict[Digits, Number]] | None = None
    tasks: dict[str, _Numbers] | None = None
    task_differences: _Differences | None = None
    task_groups: dict[str, list[str]] | None = None
    recall: Annotated[dict[str, _Recalled] | None, BeforeValidator(_parts)] = None
    generation: Annotated[dict[str, _Written] | None, BeforeValidator(_parts)] = None
    preferences: Parts = None
    cache: Annotated[_Sequences, BeforeValidator(_part)] = _Sequences()
    training: Parts = None
    controls: dict[str, "_Metrics"] | None = None
    against: "_Against | None" = None
    points: Points = None
    baseline_points: Points = None
    kernels: Points | JsonObject = None
    loss: _Numbers | list[object] | None = None
    speculative: _Speculative | list[object] | None = None


class _Against(_Metrics):
    """Another student on the same documents."""

    model: str | None = None
    tests: dict[str, _Tests] | None = None


class _Cache(_Kept):
    bytes_per_sequence: Number
    bytes_per_token: Number


class _Model(_Kept):
    cache: _Cache | None = None


class _About(_Kept):
    """Circumstances of a measurement, as far as a report says them."""

    command: str | list[str] | None = None
    commands: dict[str, str | list[str]] | list[str] | None = None
    versions: JsonObject | None = None
    device: str | None = None
    model: Annotated[_Model, BeforeValidator(_part)] = _Model()


class _LedgerLine(_Kept):
    step: Count
    tokens: Count | None = None
    eval_tokens: Count | None = None
    loss: Number = math.nan
    train_kl: Number = math.nan
    kl: Number = math.nan

    @model_validator(mode="after")
    def _has_its_tokens(self) -> "_LedgerLine":
        if self.tokens is None and not (math.isnan(self.loss) and math.isnan(self.kl)):
            raise ValueError("tokens are missing")
        return self


def read_content(path: Path) -> Json:
    """Read a file of results; raises UsageError for one that is no JSON object."""
    content = read_object(path, UsageError, HINT)
    _require_writable(content, path)
    return content


def require_measured(metrics: AnyObject, about: AnyObject, where: str) -> None:
    """Raise UsageError that names the member of a measurement which is not what a report reads."""
    fitted(_Metrics, metrics, where, "metrics", UsageError, HINT)
    fitted(_About, about, where, "", UsageError, HINT)


def read_ledger(path: Path) -> list[Json]:
    """The lines of a metrics.jsonl, up to a last one that a kill tore; raises UsageError."""
    found = []
    with open_regular(path, UsageError, LEDGER_HINT) as file:
        for number, line in numbered_lines(file, path, UsageError, LEDGER_HINT):
            where = f"{path} is no ledger: line {number}"
            try:
                value = json_value(line)
            except ValueError as error:
                if not line.endswith(b"\n"):
                    break
                raise UsageError(f"{where} is not JSON ({reason(error)})", LEDGER_HINT) from None
            if not isinstance(value, dict):
                raise UsageError(f"{where} is not a JSON object", LEDGER_HINT)
            fitted(_LedgerLine, value, where, "", UsageError, LEDGER_HINT)
            found.append(value)
    return found


def _require_writable(content: Json, path: Path) -> None:
    """Raise UsageError that names a number which overflows where it is written or drawn.

    NaN and infinity do not: pages write them, and charts leave them out.
    """
    level = [((), content)]
    while level:
        names, value = level.pop()
        if isinstance(value, dict | list):
            pairs = value.items() if isinstance(value, dict) else enumerate(value)
            level += [((*names, str(name)), inner) for name, inner in pairs]
        elif isinstance(value, int | float) and _LARGEST < abs(value) < math.inf:
            member = excerpt(".".join(names))
            raise UsageError(
                f"{path}: {member} is {reprlib.repr(value)}, which is no measurement", HINT
            )
