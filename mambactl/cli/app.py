"""The Typer application: every command, in the order of the help."""

from typing import Annotated

import typer

import mambactl
from mambactl.cli import invoke, io
from mambactl.commands import doctor, inspect, plot, recipe, report, table

SUMMARY = """Turn a Llama-family checkpoint into a hybrid Mamba model, and decode it fast.

\b
Examples:
  mambactl convert llama3-8b | mambactl distill - --data chat.jsonl
  mambactl recipe run quickstart
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


def _version(asked: bool) -> None:
    if asked:
        io.write_out(mambactl.__version__)
        raise typer.Exit()


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option("--version", help="print the version", callback=_version, is_eager=True),
    ] = False,
) -> None:
    """Only `--version` belongs to the program itself."""


invoke.register(app)
app.command("inspect")(inspect.inspect)
app.command("table")(table.table)
app.command("plot")(plot.plot)
app.command("report")(report.report)
app.command("doctor")(doctor.doctor)
app.add_typer(recipe.app, name="recipe")
