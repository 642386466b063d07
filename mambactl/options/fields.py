"""Types of fields, as flags and YAML spell them, and the options that commands share."""

import difflib
import json
import math
import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    ValidationError,
)
from pydantic_core import PydanticCustomError, core_schema

from mambactl.bounds import BATCH_ROWS, NEEDLE_TOKENS, ROW_TOKENS
from mambactl.errors import UsageError
from mambactl.foreign import excerpt
from mambactl.plain_yaml import parse_yaml

WEIGHT = re.compile(r"\d+(\.\d*)?|\.\d+")
HEAD = re.compile(r"(\d{1,9})\.(\d{1,9})")


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _split_commas(value: object) -> object:
    parts = [value] if isinstance(value, str | int) else value
    if not isinstance(parts, list | tuple):
        return value
    split = [part.split(",") if isinstance(part, str) else [part] for part in parts]
    return [piece.strip() if isinstance(piece, str) else piece for row in split for piece in row]


def _as_number(value: object) -> object:
    return int(value) if isinstance(value, str) and value.isdecimal() else value


def head_numbers(heads: str) -> list[tuple[int, int]]:
    """Layer and KV head of each part of `18.2,8.0`; raises ValueError for a part without both."""
    parts = [part.strip() for part in heads.split(",")] if heads.strip() else []
    found = [HEAD.fullmatch(part) for part in parts]
    if None in found:
        raise ValueError(f"{parts[found.index(None)]!r} is not LAYER.HEAD")
    return [(int(match[1]), int(match[2])) for match in found if match is not None]


def _head_names(value: object) -> object:
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        value = ",".join(value)
    if value is None:
        return value
    if not isinstance(value, str):
        reason = "write KV heads as one quoted string, '18.2,8.0': YAML reads 3.10 as 3.1"
        raise PydanticCustomError("heads", reason)
    try:
        head_numbers(value)
    except ValueError as error:
        reason = "{part}: write KV heads as 18.2,8.0"
        raise PydanticCustomError("heads", reason, {"part": str(error)}) from None
    return value


@dataclass(frozen=True)
class Shown:
    """The word for a value in help; one that is positional is typed without a flag."""

    metavar: str
    positional: bool = False


def split_weight(spec: str) -> tuple[str, float | None]:
    """A data set and its weight in a mixture: `DATA=0.7`, unless a file has that very name."""
    data, equals, number = spec.rpartition("=")
    if not (data and WEIGHT.fullmatch(number)) or os.path.exists(spec):
        return spec, None
    return data, float(number)


class OpenChoice:
    """Marks a Literal of the usual names as open: a table that is read later knows them all."""

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> core_schema.CoreSchema:
        return core_schema.no_info_wrap_validator_function(_name, handler(source))


def _name(value: object, usual: Callable[[object], object]) -> Any:
    return value if isinstance(value, str) and value.isidentifier() else usual(value)


# the table of mixers needs torch, which options do not load
MixerName = Annotated[Literal["mamba2", "mamba1"], OpenChoice()]
Drafts = Annotated[
    Annotated[int, Field(ge=1, le=32)] | Literal["auto"], BeforeValidator(_as_number)
]
Rows = Annotated[int, Field(ge=1, le=BATCH_ROWS.most)]
Tokens = Annotated[int, Field(ge=1, le=ROW_TOKENS.most)]
BatchSize = Annotated[Rows | Literal["auto"], BeforeValidator(_as_number)]
Compile = bool | Literal["auto"]
StoredWeights = Literal["auto", "fp8", "int8"]
WEIGHTS_HELP = (
    "fp8 and int8 hold linear layers, embedding and head apart, in 8 bits; auto is as --dtype says"
)
DataSpecs = Annotated[list[str], BeforeValidator(_as_list)]
Names = Annotated[list[str], BeforeValidator(_split_commas)]
Integers = Annotated[list[int], BeforeValidator(_split_commas)]
BatchSizes = Annotated[list[Rows], BeforeValidator(_split_commas)]
# each size has code, and a recording, of its own
Windows = Annotated[list[Tokens], Field(max_length=8), BeforeValidator(_split_commas)]
Lengths = Annotated[list[Tokens], BeforeValidator(_split_commas)]
NeedleLengths = Annotated[
    list[Annotated[int, Field(ge=1, le=NEEDLE_TOKENS.most)]], BeforeValidator(_split_commas)
]
HeadNames = Annotated[str, BeforeValidator(_head_names)]
Branches = Annotated[
    list[Literal["recurrent", "attention", "window"]], BeforeValidator(_split_commas)
]
Trackers = Annotated[
    list[Literal["tensorboard", "wandb", "trackio"]], BeforeValidator(_split_commas)
]
Shares = Annotated[list[Annotated[float, Field(gt=0, le=1)]], BeforeValidator(_split_commas)]
DistillPhases = Annotated[
    list[Literal["align", "stepwise", "logits", "onpolicy"]], BeforeValidator(_split_commas)
]

Losses = Annotated[
    list[
        Literal[
            "sigmoid",
            "sigmoid_norm",
            "hinge",
            "ipo",
            "robust",
            "exo_pair",
            "nca_pair",
            "bco_pair",
            "sppo_hard",
            "aot",
            "aot_unpaired",
            "apo_zero",
            "apo_down",
            "discopop",
            "sft",
        ]
    ],
    BeforeValidator(_split_commas),
]
Weights = Annotated[list[Annotated[float, Field(ge=0)]], BeforeValidator(_split_commas)]


# below it logits that are divided by it leave the range of float32
COOLEST = 1e-3


def is_temperature(value: float) -> bool:
    """True if a distribution can be drawn from at this temperature, or is greedy at 0."""
    return value == 0 or COOLEST <= value < math.inf


def _temperature(value: float) -> float:
    if not is_temperature(value):
        raise ValueError(f"0 is greedy, and other temperatures start at {COOLEST:g}")
    return value


Temperature = Annotated[float, AfterValidator(_temperature)]
Schedule = Annotated[
    Literal["cosine", "wsd"],
    Field(description="wsd holds the rate and lowers it over the last 15 % of a phase"),
]
# of a distribution that is matched, where 0 has no meaning
Softness = Annotated[float, Field(ge=COOLEST)]


class CommandConfig(BaseModel):
    """Options of one command: a field is a flag, and the docstring is the summary of the help."""

    # validators are built at first use: help needs none
    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        coerce_numbers_to_str=True,
        defer_build=True,
        allow_inf_nan=False,
    )

    # fields that take the place of MODEL, and how they are typed
    without_model: ClassVar[Mapping[str, str]] = {}
    # options, and those that say the same more closely, of which one counts
    more_specific: ClassVar[Mapping[str, tuple[str, ...]]] = {}

    @property
    def needs_model(self) -> bool:
        """True if the command works on a checkpoint."""
        return not any(getattr(self, name) for name in self.without_model)

    @property
    def shapes(self) -> list[str]:
        """Names of synthetic models that options ask for."""
        return []

    def require_coherent(self) -> None:
        """Raise UsageError for options that exclude each other, whatever files and models hold."""


class StageConfig(CommandConfig):
    """Options of every stage: a command that can be a section of a recipe."""

    # fields that say where a run happens, which is no part of what it makes
    placement_options: ClassVar[frozenset[str]] = frozenset(
        {"device", "trust_remote_code", "compile", "capture", "log_to", "log_every"}
    )
    # fields whose relative paths in a recipe start at its folder
    files: ClassVar[frozenset[str]] = frozenset(
        {"data", "dataset", "eval_data", "calibrate", "select_data", "prompts", "tasks"}
        | {"generation_agreement"}
    )
    # fields that name what is written beside the result: in a recipe, inside its working folder
    written: ClassVar[frozenset[str]] = frozenset(
        {"report", "needle_plot", "output_path", "use_cache"}
    )
    # fields that name what is read: it may not lie in what the stage replaces
    inputs: ClassVar[frozenset[str]] = files | {"teacher", "teacher_cache", "mixers_from", "draft"}
    # fields that name another model, and words there that mean none on this disk
    models: ClassVar[frozenset[str]] = frozenset(
        {"teacher", "mixers_from", "draft", "against", "baseline"}
    )
    no_models: ClassVar[frozenset[str]] = frozenset({"ngram"})
    # fields that name data sets, of files or of the hub
    data_sets: ClassVar[frozenset[str]] = frozenset(
        {"data", "dataset", "eval_data", "calibrate", "select_data", "preferences"}
        | {"long_context_data"}
    )
    # options that came later, and what a run did before it had them
    later: ClassVar[Mapping[str, object]] = {}
    # its kept results belong on the card of a checkpoint folder
    on_card: ClassVar[bool] = False

    # the largest that every library's generator takes
    seed: int = Field(
        default=0, ge=0, le=2**32 - 1, description="one integer for everything random"
    )
    device: str = Field(default="auto", description="cpu, cuda, cuda:1 or auto")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto",
        description="weights in memory; auto is bfloat16 on capable GPUs, else float32",
    )
    trust_remote_code: bool = Field(
        default=False, description="allow code that checkpoints and task files ship"
    )

    @property
    def ending(self) -> str:
        """The end of the default name of what the stage writes."""
        return ""

    @property
    def packages(self) -> list[str]:
        """Modules that options ask for and that not every installation has."""
        return ["matplotlib"] if getattr(self, "report", None) else []

    @property
    def other_models(self) -> list[tuple[str, str]]:
        """Options that name a model beside MODEL, each with its name."""
        named = [(option, getattr(self, option, None)) for option in sorted(self.models)]
        return [(option, spec) for option, spec in named if spec and spec not in self.no_models]

    @property
    def named_data(self) -> list[str]:
        """The data sets that options name, without their weights in a mixture."""
        named = (getattr(self, name, None) or () for name in sorted(self.data_sets))
        return [split_weight(spec)[0] for specs in named for spec in specs]

    def completed(self, source: str, describe: Callable[[str], Any]) -> "StageConfig":
        """The options with what the models decide that they name, `describe` of each its config."""
        return self

    def as_begun(self, record: Mapping[str, object]) -> Self:
        """The options with which a run goes on that `record` describes, maybe of a version before.

        What was not asked for is then as it was.
        """
        asked = self.model_fields_set
        before = {k: v for k, v in self.later.items() if k not in record and k not in asked}
        return self.model_copy(update=before)

    @property
    def since_later(self) -> set[str]:
        """Options that came later and ask for nothing new: records without them mean the same."""
        return {name for name, before in self.later.items() if getattr(self, name) == before}

    @classmethod
    def recorded(cls, options: Mapping[str, object]) -> dict[str, object]:
        """Options of a lineage as this version would have recorded them."""
        return dict(options)


Options = TypeVar("Options", bound=CommandConfig)


def nearest(word: str, known: Iterable[str]) -> str:
    """Return a hint that names the closest known word, or all of them."""
    options = sorted(known)
    close = difflib.get_close_matches(word, options, n=1)
    return f"did you mean {close[0]}?" if close else f"known: {', '.join(options)}"


def validated(command: str, options: type[Options], values: Mapping[str, object]) -> Options:
    """Build a command's options; a value out of bounds or of another type is a UsageError."""
    try:
        return options(**values)
    except ValidationError as error:
        first = error.errors()[0]
        key = str(first["loc"][0]) if first["loc"] else command
        text = first["msg"].removeprefix("Value error, ")
        reason = text[0].lower() + text[1:]
        given = values.get(key)
        raise UsageError(
            f"{command}: {key.replace('_', '-')}: {reason} (got {excerpt(repr(given))})",
            f"mambactl {command} --help",
        ) from None


def parse_settings(settings: Iterable[str]) -> dict[str, object]:
    """Turn `key=value` strings into a dictionary; values are typed as in YAML."""
    parsed = {}
    for setting in settings:
        key, separator, value = setting.partition("=")
        if not separator or not key:
            raise UsageError(f"--set {excerpt(setting)!r} is not key=value", "--set max_steps=100")
        try:
            parsed[key.strip().replace("-", "_")] = parse_yaml(value, "--set")
        except UsageError:
            # most text is no YAML; an option that takes no text refuses it
            parsed[key.strip().replace("-", "_")] = value
    return parsed


def settings(config: CommandConfig, exclude: Collection[str] = ()) -> list[str]:
    """Options of a command line that ask for a configuration, whatever recipe stands beside it."""
    given = config.model_dump(mode="json", exclude_defaults=True, exclude=set(exclude))
    return [word for key, value in given.items() for word in ("--set", f"{key}={as_yaml(value)}")]


def flags(config: CommandConfig) -> list[str]:
    """The options of a command line as a person would type them, but for those at their default."""
    words = []
    for key, value in config.model_dump(mode="json", exclude_defaults=True).items():
        name = key.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
            continue
        for each in value if isinstance(value, list) else [value]:
            words += [f"--{name}", str(each)]
    return words


def as_yaml(value: object) -> str:
    """A value in the form in which `parse_settings` reads it: JSON, which is YAML."""
    # YAML would read an escaped pair of surrogates as two characters
    return json.dumps(value, ensure_ascii=False)
