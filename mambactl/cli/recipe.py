"""`mambactl recipe`: list, show, check and run whole pipelines written as YAML."""

import json
import shlex
import time
from pathlib import Path
from typing import Annotated

import typer

from mambactl import console
from mambactl.cli import suggestions
from mambactl.cli.help import GroupedCommand, GroupedGroup
from mambactl.cli.parameters import DryRun, Force, Json, Quiet, Resume, Settings, Verbose
from mambactl.errors import ExitCode, UsageError

app = typer.Typer(help="Whole pipelines as YAML files.", cls=GroupedGroup)

Name = Annotated[
    str,
    typer.Argument(
        help="recipe file, or the name of a shipped recipe", autocompletion=suggestions.recipes
    ),
]


@app.command("list", cls=GroupedCommand)
def list_(as_json: Json = False) -> None:
    """List the recipes that come with mambactl.

    GPU is the memory for weights and optimiser, hours those of training on one H200.
    """
    from mambactl.cli.recipe_cost import listing, shipped

    found = shipped()
    if as_json:
        listed = [
            {
                "name": recipe.name,
                "description": recipe.description,
                "variants": list(recipe.variants),
                "sections": [section.key for section in recipe.sections],
                **cost.as_metrics(),
            }
            for recipe, cost in found
        ]
        console.write_json({"recipes": listed})
        return
    console.write_out(console.drawn(listing(found)))


@app.command("show", cls=GroupedCommand)
def show(name: Name, settings: Settings = None) -> None:
    """Print a recipe with every option and where its value comes from."""
    import yaml

    from mambactl.recipes import load_recipe, resolved

    recipe = load_recipe(name, settings or ())
    lines = [f"name: {recipe.name}", "stages:"]
    for key, options in resolved(recipe).items():
        lines.append(f"  {key}:")
        for option, (value, origin) in options.items():
            text = yaml.safe_dump(value, default_flow_style=True, width=10**6)
            lines.append(f"    {option}: {text.removesuffix('...' + chr(10)).strip()}  # {origin}")
    console.write_out(console.drawn("\n".join(lines)))


@app.command("plan", cls=GroupedCommand)
def plan(
    name: Name,
    gpus: Annotated[int, typer.Option("--gpus", min=1, help="GPUs that share each step")] = 1,
    memory: Annotated[
        float, typer.Option("--memory", min=1, max=1e6, help="memory of each, in 10^9 bytes")
    ] = 141,
    settings: Settings = None,
    as_json: Json = False,
) -> None:
    """Predict memory by use, tokens a second, hours and disk of a recipe's training.
    The exit code is 6 if a section does not fit as it is.

    \b
    Examples:
      mambactl recipe plan llama3-8b --gpus 8 --memory 80
      mambactl recipe plan llama3-8b --set convert.model=meta-llama/Llama-3.1-70B-Instruct --gpus 8
    """
    from mambactl.cli.recipe_plan import Gpus, as_metrics, plan_of, remarks, table_of
    from mambactl.recipes import load_recipe

    recipe, machine = load_recipe(name, settings or ()), Gpus(gpus, memory * 1e9)
    planned, unknown = plan_of(recipe, machine)
    if as_json:
        console.write_json(as_metrics(recipe, planned, unknown, machine))
    else:
        console.write_out(console.drawn(table_of(recipe, planned, machine)))
        for line in remarks(recipe, planned, unknown, machine):
            console.log(line)
    if any(each.remedies != () for each in planned):
        raise typer.Exit(ExitCode.RESOURCE)


@app.command("schema", cls=GroupedCommand)
def schema() -> None:
    """Print the JSON schema of recipe files, for editors."""
    from mambactl.recipe_schema import schema

    console.write_out(json.dumps(schema(), indent=2))


@app.command("run", cls=GroupedCommand)
def run(
    name: Name,
    out: Annotated[
        str | None, typer.Option("--out", "-o", help="working folder (default: runs/<recipe>)")
    ] = None,
    first: Annotated[
        str | None,
        typer.Option("--from", help="first section to run", autocompletion=suggestions.sections),
    ] = None,
    last: Annotated[
        str | None,
        typer.Option("--to", help="last section to run", autocompletion=suggestions.sections),
    ] = None,
    skip: Annotated[
        list[str] | None,
        typer.Option(
            "--skip",
            metavar="SECTION",
            help="leave a section out",
            autocompletion=suggestions.sections,
        ),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option("--data", metavar="DATA", help="text to learn from, in place of the recipe's"),
    ] = None,
    held_out: Annotated[
        list[str] | None,
        typer.Option("--held-out", metavar="DATA", help="text to measure on, in its place"),
    ] = None,
    settings: Settings = None,
    trusted: Annotated[
        bool,
        typer.Option(
            "--trust-remote-code",
            help="allow code that checkpoints ship, where the recipe asks for it",
        ),
    ] = False,
    resume: Resume = False,
    force: Force = False,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Run the sections of a recipe in order, one process each.

    \b
    Examples:
      mambactl recipe run quickstart
      mambactl recipe run quickstart --set distill.max_steps=50 --resume
      mambactl recipe run llama3-8b --data chat.jsonl --held-out test.jsonl -n
    """
    from mambactl.cli.own_data import data_settings
    from mambactl.cli.pipeline import Handling, commands, make_plan, run_plan, show_plan
    from mambactl.cli.recipe_cost import cost_of, show_cost
    from mambactl.cli.recipe_page import say_done, write_page
    from mambactl.recipes import load_recipe

    if resume and force:
        raise UsageError("--resume and --force exclude each other", "give one of them")
    console.set_verbosity(0 if quiet else 2 if verbose else 1)
    own = data_settings(load_recipe(name), data or (), held_out or ())
    recipe = load_recipe(name, [*own, *(settings or ())], skip or ())
    folder = Path(out) if out else Path("runs") / recipe.name
    flags = ["-q"] * quiet + ["-v"] * verbose
    again = ["mambactl", "recipe", "run", recipe.spec, "--out", str(folder)]
    repeated = {"--skip": skip, "--data": data, "--held-out": held_out, "--set": settings}
    again += [
        word for flag, given in repeated.items() for one in given or () for word in (flag, one)
    ]
    again += ["--trust-remote-code"] * trusted
    handling = Handling(tuple(flags), resume, force, trusted, as_json, shlex.join(again))
    plan = make_plan(recipe, folder, first, last, handling)
    if dry_run:
        lines, checkpoint = commands(plan)
        cost = cost_of(recipe, plan.sections)
        show_plan(plan, lines)
        show_cost(cost)
        if as_json:
            sums = {"cost": cost.as_metrics()}
            console.write_json({"checkpoint": checkpoint, "commands": lines, **sums})
        return
    started = time.monotonic()
    checkpoint, results = run_plan(plan)
    page = write_page(folder, shlex.join(again))
    say_done(recipe.name, time.monotonic() - started, page, checkpoint)
    if as_json:
        console.write_json({"checkpoint": checkpoint, "sections": results})
    else:
        # without a checkpoint what is left is the folder of the results
        console.write_out(checkpoint or str(folder.absolute()))
