"""Every option, defined once: shared ones here, a stage's own from its configuration's fields."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from inspect import Parameter, Signature
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from pydantic.fields import FieldInfo

from mambactl.options import StageConfig
from mambactl.options.fields import OpenChoice

SHORT = {"prompt": "-p", "k": "-k"}


MODEL_HELP = "folder, .st file, GGUF, hub id, alias, or - for stdin"
Model = Annotated[str, typer.Argument(help=MODEL_HELP, metavar="MODEL")]
Models = Annotated[
    list[str], typer.Argument(help=f"{MODEL_HELP}; several with --compare", metavar="MODEL")
]
Compare = Annotated[
    bool, typer.Option("--compare", help="several MODELs in one table, and on one page (--report)")
]
OptionalModel = Annotated[
    str | None, typer.Argument(help="another way to give the target", metavar="MODEL")
]
BenchModel = Annotated[
    str | None,
    typer.Argument(help=f"{MODEL_HELP}; none with --synthetic, --kernels, --loss", metavar="MODEL"),
]
Target = Annotated[
    str | None,
    typer.Option("--target", help="model to speed up; - or none in a pipe: stdin"),
]
RecipeName = Annotated[
    str | None, typer.Option("--recipe", "-r", metavar="FILE|NAME", help="use its section")
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", metavar="KEY=VALUE", help="an option, typed as YAML"),
]
DryRun = Annotated[bool, typer.Option("--dry-run", "-n", help="check and estimate, write nothing")]
Json = Annotated[bool, typer.Option("--json", help="one JSON object on stdout")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="warnings and errors only")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="more details on stderr")]
Out = Annotated[
    str | None,
    typer.Option("--out", "-o", help="folder or .st (default runs/<model>-<stage>)"),
]
RowsOut = Annotated[
    str | None,
    typer.Option("--out", "-o", help="file for --dataset (default runs/<model>-generate.jsonl)"),
]
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
    def take(cls, given: dict[str, Any]) -> "Shared":
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

    def flags(self, out: Path) -> list[str]:
        """The same options on another command line, without what a configuration holds."""
        found = ["-o", str(out)]
        asked = {"--json": self.json, "--resume": self.resume, "--force": self.force}
        asked |= {"-q": self.verbosity == 0, "-v": self.verbosity == 2}
        return found + [flag for flag, given in asked.items() if given]


COMMON: Mapping[str, tuple[Any, Any]] = {
    "recipe": (RecipeName, None),
    "settings": (Settings, None),
    "dry_run": (DryRun, False),
    "json": (Json, False),
    "quiet": (Quiet, False),
    "verbose": (Verbose, False),
}
OUTPUT: Mapping[str, tuple[Any, Any]] = {
    "out": (Out, None),
    "resume": (Resume, False),
    "force": (Force, False),
}
ROW_OUTPUT: Mapping[str, tuple[Any, Any]] = {**OUTPUT, "out": (RowsOut, None)}


def with_parameters(
    function: Callable[..., None], parameters: Mapping[str, tuple[Any, Any]]
) -> None:
    """Give `function(**given)` the signature that Typer reads: name -> (annotation, default)."""
    keyword = Parameter.KEYWORD_ONLY
    function.__signature__ = Signature(  # type: ignore[attr-defined]
        [
            Parameter(name, keyword, annotation=annotation, default=default)
            for name, (annotation, default) in parameters.items()
        ]
    )


def field_flags(config: type[StageConfig]) -> dict[str, tuple[Any, Any]]:
    """Return one flag per field; unset flags are None, so that a recipe can fill them."""
    inherited = list(StageConfig.model_fields)
    # the stage's own fields come first, what every stage has comes last
    names = sorted(config.model_fields, key=lambda name: name in inherited)
    return {name: (_flag(name, config.model_fields[name]), None) for name in names}


def _flag(name: str, field: FieldInfo) -> Any:
    kind = _flag_type(field.annotation)
    flag = "--" + name.replace("_", "-")
    names = [f"{flag}/--no-{flag[2:]}"] if kind is bool else [flag]
    if name in SHORT:
        names.append(SHORT[name])
    text = f"{field.description or ''}{_shown(field.default)}"
    metavar = name.upper() if kind == list[str] else None
    usual: list[str] = []
    if any(isinstance(mark, OpenChoice) for mark in field.metadata):
        usual = list(get_args(kind))
        kind, metavar = str, f"<{'|'.join(usual)}>"
    option = typer.Option(
        *names, help=text, metavar=metavar, autocompletion=(lambda: usual) if usual else None
    )
    return Annotated[kind | None, option]


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


def _shown(default: Any) -> str:
    # Typer cannot show it: to Typer every default is None, so that unset is known
    if default is None or default == []:
        return ""
    if isinstance(default, bool):
        default = "on" if default else "off"
    shown = ",".join(map(str, default)) if isinstance(default, list) else default
    return f" [default: {shown}]"
