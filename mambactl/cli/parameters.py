"""Every parameter, defined once: shared ones here, a command's own from its options' fields."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from inspect import Parameter, Signature
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from pydantic.fields import FieldInfo

from mambactl.cli.suggestions import Suggest, drafts, listed, models, recipes, tasks
from mambactl.commands import Command
from mambactl.json_values import JsonObject
from mambactl.options import CommandConfig, StageConfig
from mambactl.options.fields import OpenChoice, Shown

SHORT = {"prompt": "-p", "k": "-k", "out": "-o"}
# what Typer parsed, by the name of the parameter
Typed = JsonObject
Parameters = Mapping[str, tuple[Any, Any]]

MODEL_HELP = "folder, .st file, GGUF, hub id, alias, or - for stdin"
# their table needs torch
SHAPE_HELP = "shape of `bench --synthetic`, such as llama3-8b; a wrong name lists all"
Compare = Annotated[
    bool, typer.Option("--compare", help="several MODELs in one table, and on one page (--report)")
]
RecipeName = Annotated[
    str | None,
    typer.Option(
        "--recipe", "-r", metavar="FILE|NAME", help="use its section", autocompletion=recipes
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", metavar="KEY=VALUE", help="an option, typed as YAML"),
]
DryRun = Annotated[bool, typer.Option("--dry-run", "-n", help="check and estimate, write nothing")]
Json = Annotated[bool, typer.Option("--json", help="one JSON object on stdout")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="warnings and errors only")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="more details on stderr")]
Resume = Annotated[bool, typer.Option("--resume", help="continue, skip what is done")]
Force = Annotated[bool, typer.Option("--force", help="replace the output")]


@dataclass(frozen=True)
class Shared:
    """The parsed options that mean the same in every stage command."""

    recipe: str | None
    settings: tuple[str, ...]
    dry_run: bool
    json: bool
    verbosity: int
    out: str | None
    resume: bool
    force: bool

    @classmethod
    def take(cls, given: Typed) -> "Shared":
        """Remove the shared options from the parsed parameters, leaving the stage's own flags."""
        quiet, verbose = given.pop("quiet"), given.pop("verbose")
        return cls(
            recipe=given.pop("recipe"),
            settings=tuple(given.pop("settings") or ()),
            dry_run=given.pop("dry_run"),
            json=given.pop("json"),
            verbosity=0 if quiet else 2 if verbose else 1,
            out=given.pop("out", None),
            resume=given.pop("resume", False),
            force=given.pop("force", False),
        )

    def flags(self, out: Path | None) -> list[str]:
        """The same options on another command line, without what a configuration holds."""
        found = [] if out is None else ["-o", str(out)]
        asked = {"--json": self.json, "--resume": self.resume, "--force": self.force}
        asked |= {"-q": self.verbosity == 0, "-v": self.verbosity == 2}
        return found + [flag for flag, given in asked.items() if given]


COMMON: Parameters = {
    "recipe": (RecipeName, None),
    "settings": (Settings, None),
    "dry_run": (DryRun, False),
    "json": (Json, False),
    "quiet": (Quiet, False),
    "verbose": (Verbose, False),
}


def parameters_of(command: Command) -> Parameters:
    """Every parameter of a command, in the order of its help: name -> (annotation, default)."""
    if not command.is_stage:
        common = {} if command.json == "none" else {"json": (Json, False)}
        return {**_model(command), **_plain(command.options), **common}
    own = {**_model(command), **_argument(command), **_layered(command.options)}
    return {**own, **_output(command), **COMMON}


def with_parameters(function: Callable[..., None], parameters: Parameters) -> None:
    """Give `function(**given)` the signature that Typer reads: name -> (annotation, default)."""
    keyword = Parameter.KEYWORD_ONLY
    signature = Signature(
        [
            Parameter(name, keyword, annotation=annotation, default=default)
            for name, (annotation, default) in parameters.items()
        ]
    )
    setattr(function, "__signature__", signature)  # noqa: B010


def _model(command: Command) -> Parameters:
    text, other = MODEL_HELP, command.model_option
    if command.model == "none":
        return {}
    if command.model == "shape":
        return {"model": (Annotated[str, typer.Argument(help=SHAPE_HELP, metavar="NAME")], ...)}
    if command.model == "many":
        many = typer.Argument(
            help=f"{text}; several with --compare", metavar="MODEL", autocompletion=models
        )
        return {"model": (Annotated[list[str], many], ...), "compare": (Compare, False)}
    if command.model == "one" and other is None:
        given = typer.Argument(help=text, metavar="MODEL", autocompletion=models)
        return {"model": (Annotated[str, given], ...)}
    if other is None:
        instead = ", ".join(f"--{name}" for name in command.options.without_model)
        one = typer.Argument(
            help=f"{text}; none with {instead}", metavar="MODEL", autocompletion=models
        )
        return {"model": (Annotated[str | None, one], None)}
    one = typer.Argument(
        help=f"another way to give the {other.name}", metavar="MODEL", autocompletion=models
    )
    option = typer.Option(f"--{other.name}", help=other.help, autocompletion=models)
    return {
        "model": (Annotated[str | None, one], None),
        other.name: (Annotated[str | None, option], None),
    }


def _argument(command: Command) -> Parameters:
    if command.argument is None:
        return {}
    name = command.argument
    typed = typer.Argument(help=f"another way to give --{name}", metavar=f"[{name.upper()}]")
    return {typed_name(command): (Annotated[str | None, typed], None)}


def typed_name(command: Command) -> str:
    """The parameter for what is typed behind MODEL without a flag."""
    return f"typed_{command.argument}"


def _output(command: Command) -> Parameters:
    if command.writes == "nothing":
        return {}
    text = "folder or .st (default runs/<model>-<stage>)"
    if command.writes_with is not None:
        text = f"file for --{command.writes_with} (default runs/<model>-{command.name}.jsonl)"
    out = Annotated[str | None, typer.Option("--out", "-o", help=text)]
    return {"out": (out, None), "resume": (Resume, False), "force": (Force, False)}


def _layered(options: type[CommandConfig]) -> Parameters:
    """One flag per field; unset flags are None, so that a recipe can fill them."""
    inherited = list(StageConfig.model_fields)
    # the stage's own fields come first, what every stage has comes last
    names = sorted(options.model_fields, key=lambda name: name in inherited)
    return {name: (_flag(name, options.model_fields[name]), None) for name in names}


def _flag(name: str, field: FieldInfo) -> Any:
    kind = _flag_type(field.annotation)
    flag, *short = _names(name)
    if kind is bool:
        flag = f"{flag}/--no-{flag[2:]}"
    text = f"{field.description or ''}{_shown(field.default)}"
    metavar = ("DATA" if name in StageConfig.data_sets else "A,B") if kind == list[str] else None
    usual: list[str] = []
    if any(isinstance(mark, OpenChoice) for mark in field.metadata):
        usual = list(get_args(kind))
        kind, metavar = str, f"<{'|'.join(usual)}>"
    complete = (lambda: usual) if usual else _suggest(name, field.annotation)
    option = typer.Option(flag, *short, help=text, metavar=metavar, autocompletion=complete)
    return Annotated[kind | None, option]


# completions of options that name a model, but not any
_MODELS = {"draft": drafts}


def _suggest(name: str, annotation: Any) -> Suggest | None:
    """Completion for an option's value; None for files."""
    if name == "tasks":
        return tasks
    if name in StageConfig.models:
        return _MODELS.get(name, models)
    # a list whose members are words of a kind
    for part in _parts_of(annotation):
        if get_origin(part) is list and get_origin(get_args(part)[0]) is Literal:
            return listed(get_args(get_args(part)[0]))
    return None


def _parts_of(annotation: Any) -> list[object]:
    inner = [get_args(part)[0] for part in get_args(annotation) if get_origin(part) is Annotated]
    whole = get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation
    return [whole, *inner]


def _plain(options: type[CommandConfig]) -> Parameters:
    """One flag or argument per field, with the field's own default: nothing else fills it."""
    return {name: _parameter(name, field) for name, field in options.model_fields.items()}


def _parameter(name: str, field: FieldInfo) -> tuple[Any, Any]:
    shown = next((part for part in field.metadata if isinstance(part, Shown)), None)
    text, metavar = field.description, shown and shown.metavar
    if shown is not None and shown.positional:
        kind = typer.Argument(help=text, metavar=metavar)
    else:
        kind = typer.Option(*_names(name), help=text, metavar=metavar)
    default = ... if field.is_required() else field.default
    return Annotated[field.annotation, kind], default


def _names(name: str) -> list[str]:
    flag = "--" + name.replace("_", "-")
    return [flag, SHORT[name]] if name in SHORT else [flag]


def _flag_type(annotation: Any) -> Any:
    if any(get_origin(part) is Literal for part in get_args(annotation)):
        # a number or a word: text, which the configuration reads
        return str
    if get_origin(annotation) not in (Annotated, list, Literal):
        inner = [part for part in get_args(annotation) if part is not NoneType]
        annotation = inner[0] if inner else annotation
    if get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    # lists are typed by the configuration, which also splits commas
    return list[str] if get_origin(annotation) is list else annotation


def _shown(default: object) -> str:
    # Typer cannot show it: to Typer every default is None, so that unset is known
    if default is None or default == []:
        return ""
    if isinstance(default, bool):
        default = "on" if default else "off"
    shown = ",".join(map(str, default)) if isinstance(default, list) else default
    return f" [default: {shown}]"
