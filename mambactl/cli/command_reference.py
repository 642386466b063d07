"""Reference of the command line in Markdown, read from the code whenever it is asked for."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import typer
from typer.main import get_command, get_group

from mambactl.cli import recipe
from mambactl.cli.help import GroupedCommand, parameters_by_heading
from mambactl.cli.parameters import parameters_of, with_parameters
from mambactl.cli.recipe_cost import listing, shipped
from mambactl.commands import COMMANDS, Command
from mambactl.errors import EXIT_CODES
from mambactl.metrics import markdown_row

if TYPE_CHECKING:
    from typer._click import Command as ClickCommand

# variables that a user may set; a test compares those of our own with the code
VARIABLES: Mapping[str, str] = {
    "MAMBACTL_CACHE": "folder of fetched weights, kept tokens and prompts "
    "(default: `~/.cache/mambactl`)",
    "MAMBACTL_KERNELS": "`auto`, or unset, takes the fastest; `reference` turns every GPU "
    "kernel off and computes in plain PyTorch; `mamba-ssm` computes scans and convolutions on a "
    "GPU with the packages mamba-ssm and causal-conv1d, and decodes with the reference",
    "MAMBACTL_API_KEY": "the key that clients of `serve` have to send; without it none is asked",
    "MAMBACTL_DEBUG": "`1` shows the traceback of expected errors as well",
    "HF_TOKEN": "token of the model hub for gated and private repositories, and for `push`",
    "HF_HUB_OFFLINE": "`1` sends nothing to the hub; models and data come from its cache",
    "CUDA_VISIBLE_DEVICES": "the GPUs that a command may use",
    "OMP_NUM_THREADS": "threads of PyTorch on a CPU",
    "WANDB_PROJECT": "project of `--log-to wandb` (default: `mambactl`)",
    "NO_COLOR": "any value turns colours on stderr and in the pager off",
    "PAGER": "the pager of `mambactl docs`",
}


def reference() -> str:
    """The whole reference: every command, recipes, exit codes and environment variables."""
    parts = [
        "# Reference: commands, recipes, exit codes, environment variables",
        "Made from the code of the installed version. `mambactl docs COMMAND` shows one command.",
        *(_deeper(command_page(name)) for name in command_names()),
        _section("Recipes", RECIPES_TEXT, _recipes()),
        _section("Exit codes", "", _exit_codes()),
        _section("Environment variables", "", _variables()),
    ]
    return "\n\n".join(parts) + "\n"


RECIPES_TEXT = (
    "`mambactl recipe run NAME`, or `NAME@VARIANT`. GPU is the memory for weights and optimiser, "
    "hours are those of training on one H200; activations come on top."
)


def command_names() -> list[str]:
    """Commands with a page of their own, in the order of the help."""
    return [*COMMANDS, "recipe"]


def command_page(name: str) -> str:
    """Summary, examples, arguments and options of one command, or of each command of a group."""
    if name in COMMANDS:
        return _page(name, _parsed(COMMANDS[name]), COMMANDS[name].examples)
    group = get_group(recipe.app)
    pages = [
        _deeper(_page(f"{name} {part}", command, ())) for part, command in group.commands.items()
    ]
    return "\n\n".join([f"# mambactl {name}", group.help or "", *pages])


def _parsed(command: Command) -> "ClickCommand":
    def function(**given: object) -> None:
        """Stand for the command, whose parameters alone are read."""

    with_parameters(function, parameters_of(command))
    app = typer.Typer(add_completion=False)
    app.command(command.name, cls=GroupedCommand, help=command.options.__doc__)(function)
    return get_command(app)


def _page(name: str, command: "ClickCommand", examples: Sequence[str]) -> str:
    summary, _, typed = (command.help or "").partition("\n\n\b\nExamples:\n")
    lines = list(examples) or [line.strip() for line in typed.splitlines()]
    parts = [f"# mambactl {name}", summary]
    if lines:
        parts.append("\n".join(["```bash", *lines, "```"]))
    context = command.context_class(command, info_name=command.name)
    arguments, sections = parameters_by_heading(command.get_params(context), context)
    if arguments:
        parts.append(_section("Arguments", "", _table(("argument", "meaning"), arguments)))
    for heading, rows in sections.items():
        shown = [(f"`{option}`", meaning) for option, meaning in rows]
        parts.append(_section(heading, "", _table(("option", "meaning"), shown)))
    return "\n\n".join(parts)


def _section(heading: str, text: str, table: str) -> str:
    return "\n\n".join(filter(None, (f"## {heading}", text, table)))


def _deeper(page: str) -> str:
    """The page with every heading one level lower; code keeps its comments."""
    blocks = page.split("```")
    blocks[::2] = [block.replace("\n#", "\n##") for block in ("\n" + blocks[0], *blocks[2::2])]
    return "```".join(blocks).removeprefix("\n")


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(_lines(columns, rows))


def _lines(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield markdown_row(columns)
    yield markdown_row(["---"] * len(columns))
    for row in rows:
        yield markdown_row([" ".join(cell.split()).replace("|", "\\|") for cell in row])


def _recipes() -> str:
    found = listing(shipped())
    return _table(found.columns, [list(map(str, row)) for row in found.rows])


def _exit_codes() -> str:
    return _table(("code", "meaning"), [(str(int(c)), text) for c, text in EXIT_CODES.items()])


def _variables() -> str:
    return _table(("variable", "meaning"), [(f"`{n}`", text) for n, text in VARIABLES.items()])
