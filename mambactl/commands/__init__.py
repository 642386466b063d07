"""The table of commands: a row each, and a file of the row's name with the work itself.

Importing it loads no heavy library. A row's module is imported when the command runs.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from typing import Literal

from mambactl.errors import UsageError
from mambactl.options.fields import CommandConfig, StageConfig, nearest, validated
from mambactl.present import of_kind


@dataclass(frozen=True)
class ModelOption:
    """An option that means MODEL, and is a key of recipes as well."""

    name: str
    help: str
    # a command line for who gave no model at all
    usage: str


@dataclass(frozen=True)
class Command:
    """All that the command line, recipes and reports know of a command.

    `model` says what MODEL is: `optional` where options may take its place, `many` where
    `--compare` takes several, `shape` where it is the name of a synthetic model. `writes` is what
    `-o` names: `model` for a checkpoint that later commands take, `data` for a folder of another
    kind, `rows` for a file of rows; `writes_with` is the option without which nothing is written.
    `resumable` commands continue with `--resume` what a signal stopped. `json` is what `--json`
    prints: the result with its checkpoint, or the metrics alone. `argument` is an option that may
    also be typed behind MODEL, without its flag.
    `needs_torch` is for commands that are no stages, which all do. `group` is where the help of the
    program lists it; `next_command` is what is typed next, with `{path}` for what was written, or
    measured, and `{source}` for MODEL.
    """

    name: str
    # the class, or where it is: `module:Class`
    options_at: type[CommandConfig] | str
    examples: tuple[str, ...] = ()
    model: Literal["one", "optional", "many", "shape", "none"] = "one"
    model_option: ModelOption | None = None
    writes: Literal["model", "data", "rows", "nothing"] = "nothing"
    writes_with: str | None = None
    resumable: bool = False
    json: Literal["result", "metrics", "none"] = "result"
    argument: str | None = None
    needs_torch: bool = False
    group: Literal["make", "measure", "use", "look"] = "use"
    next_command: str = ""

    @cached_property
    def options(self) -> type[CommandConfig]:
        """The class of the command's options; only a command that is asked for loads it."""
        if not isinstance(self.options_at, str):
            return self.options_at
        module, _, name = self.options_at.partition(":")
        return getattr(import_module(module), name)

    @property
    def module(self) -> str:
        """The module with the command's `run`, and a stage's `plan`."""
        return f"{__name__}.{self.name.replace('-', '_')}"

    @property
    def is_stage(self) -> bool:
        """True if the command can be a section of a recipe, whose options come in layers."""
        return issubclass(self.options, StageConfig)

    @property
    def stage_options(self) -> type[StageConfig]:
        """The class of a stage's options; TypeError for a command that is none."""
        if not issubclass(self.options, StageConfig):
            raise TypeError(f"{self.name} is no stage")
        return self.options

    @property
    def reads_model(self) -> bool:
        """True if what is typed as MODEL is a checkpoint, or the name of one."""
        return self.model not in ("shape", "none")

    @property
    def model_keys(self) -> tuple[str, ...]:
        """The keys of a recipe's section that mean MODEL; the last one counts."""
        return ("model",) if self.model_option is None else ("model", self.model_option.name)

    def ending(self, options: StageConfig) -> str | None:
        """The end of the default name of what is written; None where nothing is."""
        if self.writes == "nothing":
            return None
        if self.writes_with is not None and not getattr(options, self.writes_with):
            return None
        return options.ending


# in the order of the help
_ROWS = (
    Command(
        "convert",
        "mambactl.options.conversion:ConvertConfig",
        (
            "mambactl convert llama3-8b --ratio 0.5",
            "mambactl convert smollm2-135m -o t.st",
            "mambactl convert smollm2-135m --form portable -o p.st",
        ),
        writes="model",
        group="make",
        next_command="mambactl distill {path} --data FILE",
    ),
    Command(
        "teacher-cache",
        "mambactl.options.training:TeacherCacheConfig",
        (
            "mambactl teacher-cache llama3-8b --data chat.jsonl -o cache",
            "mambactl distill s.st --data chat.jsonl --teacher-cache cache --stages logits",
        ),
        writes="data",
        resumable=True,
        group="make",
        next_command="mambactl distill STUDENT --data FILE --teacher-cache {path}",
    ),
    Command(
        "distill",
        "mambactl.options.training:DistillConfig",
        (
            "mambactl distill runs/llama3-8b-convert --data chat.jsonl",
            "mambactl convert llama3-8b | mambactl distill - --data chat.jsonl",
            "mambactl distill s.st --data chat.jsonl --stages align,logits,onpolicy",
        ),
        writes="model",
        resumable=True,
        group="make",
        next_command="mambactl eval {path} --data FILE",
    ),
    Command(
        "sft",
        "mambactl.options.training:SftConfig",
        (
            "mambactl sft student.st --data chat.jsonl -o tuned.st",
            "mambactl sft student.st --data chat.jsonl --kl-weight 1",
            "mambactl sft s.st --data chat.jsonl=0.7 --data code.jsonl=0.3 --lora 16",
        ),
        writes="model",
        resumable=True,
        group="make",
        next_command="mambactl eval {path} --data FILE",
    ),
    Command(
        "dpo",
        "mambactl.options.training:DpoConfig",
        (
            "mambactl dpo tuned.st --data preferences.jsonl -o t.st",
            "mambactl dpo tuned.st --data pairs.jsonl --reference self --eval-share 0.1",
        ),
        writes="model",
        resumable=True,
        group="make",
        next_command="mambactl eval {path} --data FILE",
    ),
    Command(
        "draft",
        "mambactl.options.drafting:DraftConfig",
        (
            "mambactl draft t.st --data chats.jsonl -o d.st",
            "mambactl draft t.st --data answers.jsonl --text data --vocabulary 16384 -o d.st",
            "mambactl draft t.st --kind model --layers 4 --data chats.jsonl -o d.st",
        ),
        writes="model",
        resumable=True,
        group="make",
        next_command="mambactl spec-decode --draft {path} --target {source}",
    ),
    Command(
        "eval",
        "mambactl.evaluation.probes:EvalConfig",
        (
            "mambactl eval t.st --data held-out.jsonl",
            "mambactl eval a.st b.st --compare --data held-out.jsonl --report page.html",
            "mambactl eval t.st --tasks arc_easy,hellaswag --limit 200",
            "mambactl eval t.st --data held-out.jsonl --against other.st",
            "mambactl eval t.st --needle 1024,4096,8192 --needle-plot needle.png",
            "mambactl eval t.st --preferences preferences.jsonl",
            "mambactl eval t.st --tasks paper-zeroshot --task-dir sets",
        ),
        model="many",
        group="measure",
        next_command="mambactl report {path}",
    ),
    Command(
        "spec-decode",
        "mambactl.options.generation:SpecDecodeConfig",
        (
            "mambactl spec-decode --draft d.st --target t.st",
            'mambactl spec-decode --draft ngram --target t.st -p "Once upon" --check',
        ),
        model_option=ModelOption(
            "target",
            help="model to speed up; - or none in a pipe: stdin",
            usage="mambactl spec-decode --draft DRAFT --target MODEL",
        ),
        group="measure",
    ),
    Command(
        "synthetic",
        "mambactl.options.measurement:SyntheticConfig",
        ("mambactl synthetic llama3-8b -o random", "mambactl synthetic tiny -o tiny.st"),
        model="shape",
        writes="model",
        group="measure",
        next_command="mambactl convert {path}",
    ),
    Command(
        "bench",
        "mambactl.options.measurement:BenchConfig",
        (
            "mambactl bench t.st",
            "mambactl bench t.st --input-len 128,2048 --baseline teacher",
            "mambactl bench --synthetic mamba-2.8b --draft mamba-130m -k 3",
        ),
        model="optional",
        group="measure",
        next_command="mambactl report {path}",
    ),
    Command(
        "generate",
        "mambactl.options.generation:GenerateConfig",
        (
            'mambactl generate t.st "Why is the sky blue?"',
            "mambactl generate t.st --prompts questions.txt --draft ngram",
            'mambactl generate t.st -p "$RULES Why?" --prefix-cache ~/.cache/prefixes',
            "mambactl generate llama3-8b --dataset prompts.jsonl -o labels.jsonl",
        ),
        writes="rows",
        writes_with="dataset",
        resumable=True,
        argument="prompt",
    ),
    Command(
        "chat",
        "mambactl.options.generation:ChatConfig",
        (
            "mambactl chat t.st",
            'mambactl chat t.st --draft d.st --system "Answer in one sentence."',
            "printf 'hi\\nwhy?\\n' | mambactl chat t.st",
        ),
    ),
    Command(
        "serve",
        "mambactl.options.generation:ServeConfig",
        (
            "mambactl serve t.st",
            "mambactl serve t.st --draft d.st --host 0.0.0.0 --port 8080",
            "MAMBACTL_API_KEY=secret mambactl serve llama3-8b --max-length 4096",
        ),
    ),
    Command(
        "export",
        "mambactl.options.exporting:ExportConfig",
        (
            "mambactl export t.st -o hf",
            "mambactl export t.st --to gguf --dtype q8_0 -o t.gguf",
            "mambactl convert smollm2-135m --init reference | mambactl export - --to gguf",
        ),
        writes="data",
    ),
    Command(
        "push",
        "mambactl.options.pushing:PushConfig",
        (
            "mambactl push t.st org/name",
            "mambactl push runs/smollm2-135m-distill org/name --public",
            "mambactl distill s.st --data chat.jsonl | mambactl push - org/name",
        ),
        json="metrics",
        needs_torch=True,
    ),
    Command(
        "inspect",
        "mambactl.options.reading:InspectConfig",
        (
            "mambactl inspect t.st",
            "mambactl inspect runs/llama3-8b-convert --tensors",
            "mambactl inspect t.st --batch-size 8 --input-len 4096 -k 4",
        ),
        json="metrics",
        group="look",
    ),
    Command(
        "table",
        "mambactl.options.reading:TableConfig",
        (
            "mambactl bench --synthetic tiny --json > b.json && mambactl table b.json",
            "mambactl table bench.json --into README.md",
        ),
        model="none",
        json="none",
        group="look",
    ),
    Command(
        "plot",
        "mambactl.options.reading:PlotConfig",
        (
            "mambactl plot runs/smollm2-135m-distill",
            "mambactl plot a.st b.st runs/c.partial -o compare.png",
        ),
        model="none",
        json="none",
        group="look",
    ),
    Command(
        "report",
        "mambactl.options.reading:ReportConfig",
        (
            "mambactl report runs/a runs/b -o compare.html",
            "mambactl report bench.json d.st.metrics.jsonl",
        ),
        model="none",
        json="none",
        group="look",
    ),
    Command(
        "doctor",
        "mambactl.options.reading:DoctorConfig",
        ("mambactl doctor", "mambactl doctor --deep"),
        model="none",
        json="metrics",
        group="look",
    ),
)

COMMANDS: dict[str, Command] = {row.name: row for row in _ROWS}


def stages() -> dict[str, Command]:
    """The commands that can be sections of a recipe."""
    return {name: command for name, command in COMMANDS.items() if command.is_stage}


def configure(stage: str, *layers: Mapping[str, object]) -> StageConfig:
    """Build a stage's configuration; later layers win and an unknown key is a UsageError."""
    return of_kind(StageConfig, configured(stage, *layers))


def configured(stage: str, *layers: Mapping[str, object]) -> CommandConfig:
    """Build any command's configuration, as `configure` does."""
    options = COMMANDS[stage].options
    merged: dict[str, object] = {}
    for layer in layers:
        for key in layer:
            if key not in options.model_fields:
                known = nearest(key, options.model_fields)
                raise UsageError(f"{stage} has no option {key}", known)
        merged.update(layer)
    return validated(stage, options, merged)
