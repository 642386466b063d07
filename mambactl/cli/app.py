"""The Typer application: every command, in the order of the help."""

from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

from mambactl import console
from mambactl.cli import recipe
from mambactl.cli.parameters import parameters_of, with_parameters
from mambactl.commands import COMMANDS, Command
from mambactl.version import __version__

SUMMARY = """Turn a Llama-family checkpoint into a hybrid Mamba model, and decode it fast.

\b
Examples:
  mambactl convert llama3-8b | mambactl distill - --data chat.jsonl
  mambactl recipe run quickstart
"""
# commands with commands of their own
GROUPS = {"recipe": recipe.app}


def make_app(asked: str | None = None) -> typer.Typer:
    """Return the application with a command for every row of COMMANDS, then the groups.

    Where `asked` is the name of a command, it is the only one: no other's options are loaded.
    """
    app = typer.Typer(
        name="mambactl",
        help=SUMMARY,
        pretty_exceptions_enable=False,
        # plain help: rich would double the time it takes to appear
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
        epilog="Results go to stdout (one line), all else to stderr. More: README.md",
    )
    app.callback()(root)
    rows = [COMMANDS[asked]] if asked in COMMANDS else COMMANDS.values()
    for command in rows:
        app.command(command.name, help=_help(command))(_function(command))
    for name, group in GROUPS.items():
        app.add_typer(group, name=name)
    return app


def continues(arguments: Sequence[str]) -> bool:
    """Whether `--resume` continues what a signal stopped in this command line."""
    name, *rest = arguments or [""]
    command = COMMANDS.get(name)
    if command is None:
        # the sections of a recipe are kept one by one
        return name in GROUPS
    words = {word.partition("=")[0] for word in rest}
    needed = command.writes_with
    return command.resumable and (needed is None or f"--{needed}" in words)


def _version(asked: bool) -> None:
    if asked:
        console.write_out(__version__)
        raise typer.Exit()


def root(
    version: Annotated[
        bool,
        typer.Option("--version", help="print the version", callback=_version, is_eager=True),
    ] = False,
) -> None:
    """Only `--version` belongs to the program itself."""


def _help(command: Command) -> str:
    summary = command.options.__doc__ or ""
    if not command.examples:
        return summary
    lines = "\n".join(f"  {example}" for example in command.examples)
    return f"{summary}\n\n\b\nExamples:\n{lines}"


def _function(command: Command) -> Callable[..., None]:
    def function(**given: Any) -> None:
        # help and completion need none of it
        from mambactl.cli.invoke import run_command

        run_command(command, given)

    with_parameters(function, parameters_of(command))
    return function
