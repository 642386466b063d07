"""The Typer application: every command, in the order of the help."""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import typer

from mambactl import console
from mambactl.cli import docs, recipe
from mambactl.cli.closing import Closing, in_pipe
from mambactl.cli.headings import COMMAND_GROUPS
from mambactl.cli.help import WIDEST, GroupedCommand, GroupedGroup
from mambactl.cli.parameters import Shared, Typed, parameters_of, typed_name, with_parameters
from mambactl.cli.precedence import settled
from mambactl.commands import COMMANDS, Command, configure
from mambactl.errors import UsageError
from mambactl.files import default_out
from mambactl.heartbeat import heartbeat
from mambactl.options import CommandConfig, LaunchConfig, SpreadConfig, StageConfig
from mambactl.options.fields import parse_settings, validated
from mambactl.present import present
from mambactl.ranks import is_main, launched
from mambactl.requirements import purposes, require_packages
from mambactl.stage_result import StageResult
from mambactl.version import __version__

SUMMARY = """Turn a Llama-family checkpoint into a hybrid Mamba model, and decode it fast.

\b
Examples:
  mambactl convert llama3-8b | mambactl distill - --data chat.jsonl
  mambactl recipe run quickstart
"""
_EXTRAS = ", ".join(f"{name} ({purpose})" for name, purpose in purposes().items())
EPILOG = f"""Results go to stdout (one line), all else to stderr. More: mambactl docs

Extras, by `pip install "mambactl[NAME]"`: {_EXTRAS}.
`mambactl doctor` shows what is missing, and the whole line."""
# commands with commands of their own
GROUPS = {"recipe": recipe.app}
# commands about the command line itself, which have no model and no configuration
FUNCTIONS = {"docs": docs.docs}


def make_app(asked: str | None = None) -> typer.Typer:
    """Return the application with a command for every row of COMMANDS, then the groups.

    Where `asked` is the name of a command, it is the only one: no other's options are loaded.
    Where it is none, commands are listed and completed, and have no parameters.
    """
    app = typer.Typer(
        name="mambactl",
        help=SUMMARY,
        pretty_exceptions_enable=False,
        # plain help: rich would double the time it takes to appear
        rich_markup_mode=None,
        cls=GroupedGroup,
        context_settings=WIDEST,
        epilog=EPILOG,
    )
    app.callback()(root)
    rows = [COMMANDS[asked]] if asked in COMMANDS else COMMANDS.values()
    for command in rows:
        heading = COMMAND_GROUPS[command.group]
        made = app.command(
            command.name, cls=GroupedCommand, help=_help(command), rich_help_panel=heading
        )
        made(_function(command) if command.name == asked else _listed)
    for name, group in GROUPS.items():
        app.add_typer(group, name=name, rich_help_panel=COMMAND_GROUPS["make"])
    for name, function in FUNCTIONS.items():
        app.command(name, cls=GroupedCommand, rich_help_panel=COMMAND_GROUPS["look"])(function)
    return app


def continues(arguments: Sequence[str]) -> bool:
    """True if this command line, run again with `--resume`, continues a stopped run."""
    name, *rest = arguments or [""]
    command = COMMANDS.get(name)
    if command is None:
        # the sections of a recipe are kept one by one
        return name in GROUPS
    words = {word.partition("=")[0] for word in rest}
    # as the processes of `--nproc` are started
    words |= {f"--{word.partition('=')[0]}" for flag, word in pairwise(rest) if flag == "--set"}
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


def _listed() -> None:
    """Stand for a command that is only named."""


def _function(command: Command) -> Callable[..., None]:
    def function(**given: object) -> None:
        run_command(command, given)

    with_parameters(function, parameters_of(command))
    return function


def run_command(command: Command, given: Typed) -> None:
    """Run one command from parsed parameters and write its result to stdout."""
    if command.is_stage:
        run_stage(command, given)
    else:
        _run_plain(command, given)


def run_stage(command: Command, given: Typed) -> None:
    """Run one stage: its options come from flags, `--set`, a recipe and defaults."""
    shared = Shared.take(given)
    console.set_verbosity(shared.verbosity if is_main() else console.SILENT)
    started, piped = time.monotonic(), in_pipe()
    console.name_tables(command.name if piped else "")
    if shared.resume and shared.force:
        raise UsageError("--resume and --force exclude each other", "give one of them")
    others = take_others(command, given)
    model = take_model(command, given)
    take_argument(command, given)
    flags = {key: value for key, value in given.items() if value not in (None, [])}
    if flags.get("prompt") == "-":
        if model == "-":
            raise UsageError("MODEL and the prompt cannot both be -", "give one of them as text")
        flags["prompt"] = console.read_text("-")
    config = _config(command.name, shared, flags)
    if launched():
        from mambactl.cli.processes import of_this_run

        config = of_this_run(command.name, config)
    # a stage before this one may take hours
    require_packages(config.packages)
    source = read_source(command, config, model)
    ending = command.ending(config)
    closing = Closing(command, started, piped)
    if ending is None:
        _refuse_output(command, shared)
        _call(
            command,
            config,
            source,
            None,
            shared,
            closing,
            [console.read_model(other) for other in others],
        )
        return
    out = Path(shared.out) if shared.out else default_out(present(source), command.name, ending)
    again = {"resume": shared.resume, "force": shared.force}
    # the help needs nothing of checkpoints
    from mambactl.checkpoint.provenance import made_before
    from mambactl.cli.preflight import announce

    with console.guarded_stdout(), heartbeat(command.name):
        if shared.resume:
            # what lies there may have to be compared with the options
            announce()
        recipes = [("--recipe", shared.recipe)] if shared.recipe else []
        made = made_before(
            out, command, config, present(source), **again, others=recipes, dry_run=shared.dry_run
        )
    if made is not None:
        console.log(f"{out} is complete, nothing to do")
        _say(command, shared, StageResult(str(out.absolute()), made.get("metrics", {})))
        return
    _call(command, config, source, out, shared, closing)


def _run_plain(command: Command, given: Typed) -> None:
    as_json = bool(given.pop("json", False))
    others = take_others(command, given)
    model = take_model(command, given)
    options = validated(command.name, command.options, given)
    source = read_source(command, options, model)
    models = (
        [] if command.model == "none" else [source, *(console.read_model(each) for each in others)]
    )
    with console.guarded_stdout(), heartbeat(command.name):
        if command.needs_torch:
            from mambactl.cli.preflight import announce, require_models

            require_models(models)
            announce()
        result = import_module(command.module).run(options, *models)
    _write(command, as_json, result)


def _refuse_output(command: Command, shared: Shared) -> None:
    for flag in ("out", "resume", "force"):
        if getattr(shared, flag):
            raise UsageError(f"--{flag} goes with --{command.writes_with}", f"drop --{flag}")


def _call(
    command: Command,
    config: StageConfig,
    source: str | None,
    out: Path | None,
    shared: Shared,
    closing: Closing,
    others: Sequence[str] = (),
) -> None:
    # the help needs nothing of checkpoints
    from mambactl.cli import preflight

    with console.guarded_stdout(), heartbeat(command.name):
        preflight.require_known(command, config, source)
        preflight.require_found(config, [source, *others] if command.reads_model else [])
    spread = config if isinstance(config, LaunchConfig) and config.is_launched else None
    if launched():
        spread = None
    if spread is not None and not shared.dry_run:
        from mambactl.cli.processes import launch

        with console.guarded_stdout():
            flags = [*shared.flags(out), *(["--compare"] if others else [])]
            line = launch(spread, command.name, [present(source), *others], flags)
        console.write_out(line)
        return
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    with console.guarded_stdout(texts=not shared.json), heartbeat(command.name):
        with preflight.loading():
            module = import_module(command.module)
        preflight.warn_of_unused_kernels(config)
        call = module.plan if shared.dry_run else module.run
        if others or getattr(config, "report", None):
            compare = import_module("mambactl.report.compare")
            call = partial(compare.plan if shared.dry_run else compare.run, command=module)
            call = partial(call, config, [source, *others])
            source = None
        else:
            call = partial(call, config, source)
        planned, result = None, None
        if shared.dry_run:
            planned = call()
            if spread is not None:
                from mambactl.cli.processes import shards

                split = shards(spread, present(source))
                splits = isinstance(spread, SpreadConfig)
                planned |= {"sharded": split} if splits else {"processes": spread.processes}
        elif out is not None:
            result = call(out, resume=shared.resume, force=shared.force)
        else:
            result = call()
        if launched():
            import_module("mambactl.ranks").leave()
    if result is None:
        _show_plan(command, shared, present(planned), out)
        return
    path = result.path
    if path is not None and (file := Path(path).expanduser()).exists():
        path = str(file.absolute())
    closing.show(source, out)
    _say(command, shared, replace(result, path=path))


def _say(command: Command, shared: Shared, result: StageResult) -> None:
    # one of several processes speaks for all
    if is_main():
        _write(command, shared.json, result)


def _write(command: Command, as_json: bool, result: StageResult) -> None:
    text = "\n".join(map(console.drawn, result.blocks)) if result.blocks else result.text
    if result.written:
        return
    if not as_json:
        console.write_out(present(result.path) if text is None else text)
    elif command.json == "metrics":
        console.write_json(result.metrics)
    else:
        content = {"stage": command.name, "checkpoint": result.path, "metrics": result.metrics}
        console.write_json(content if text is None else {**content, "text": text})


def _config(stage: str, shared: Shared, flags: Typed) -> StageConfig:
    settings = parse_settings(shared.settings)
    if not shared.recipe:
        return configure(stage, settled(stage, {}, settings | flags))
    from mambactl.recipes import REFERENCE, TRUST, load_recipe

    section = load_recipe(shared.recipe).section(stage)
    config = configure(stage, settled(stage, section.values, settings | flags))
    if section.asks_for_trust and TRUST not in settings | flags:
        raise UsageError(
            f"{shared.recipe}: {section.key} asks to run code that a checkpoint ships ({TRUST})",
            "if you trust it, add --trust-remote-code",
        )
    for name in REFERENCE.findall(str(section.values)):
        if f"${{{name}}}" in str(config):
            hint = f"mambactl recipe run {shared.recipe}, or set the option yourself"
            raise UsageError(f"${{{name}}} has a meaning only inside `recipe run`", hint)
    return config


def _show_plan(command: Command, shared: Shared, plan: dict[str, object], out: Path | None) -> None:
    if out is not None:
        plan = {"out": str(out.absolute()), **plan}
    if shared.json and is_main():
        # nothing is made, so there is no checkpoint to hand on
        console.write_json({"stage": command.name, "checkpoint": None, **plan})
    elif not shared.json:
        from mambactl.cli.plan_tables import show_plan

        show_plan(command.name, plan)


def take_model(command: Command, given: Typed) -> str | None:
    """Remove MODEL from the parsed parameters, and the option that means it."""
    model, option = given.pop("model", None), command.model_option
    if option is None:
        return model
    named = given.pop(option.name)
    if model is not None and named is not None:
        raise UsageError(f"MODEL and --{option.name} are the same thing", "give one of them")
    if model is not None or named is not None:
        return named if model is None else model
    if console.stdin_is_pipe():
        return "-"
    raise UsageError(f"no {option.name}", option.usage)


def take_argument(command: Command, given: Typed) -> None:
    """Put what was typed behind MODEL into `given`, under the name of the option that it is."""
    name, typed = command.argument, given.pop(typed_name(command), None)
    if name is None or typed is None:
        return
    if given[name] is not None:
        raise UsageError(f"{name.upper()} and --{name} are the same thing", "give one of them")
    given[name] = typed


def take_others(command: Command, given: Typed) -> list[str]:
    """Leave the first of several models in `given`, return those it is compared with."""
    if command.model != "many":
        return []
    models, compare = given["model"], given.pop("compare")
    if compare and len(models) < 2:
        raise UsageError(
            "--compare needs two MODELs or more", f"mambactl {command.name} A B --compare"
        )
    if not compare and len(models) > 1:
        raise UsageError(f"{len(models)} MODELs without --compare", "add --compare")
    given["model"], *others = models
    return others


def read_source(command: Command, options: CommandConfig, model: str | None) -> str | None:
    """The model that the command works on, from stdin if need be; None where it needs none."""
    if command.model == "none":
        return None
    instead = options.without_model
    if not options.needs_model:
        if model is not None:
            *most, last = (f"--{name}" for name in instead)
            who = f"{', '.join(most)} and {last} work" if most else f"{last} works"
            raise UsageError(f"{who} without a MODEL", f"drop {model}, or the option")
        return None
    if model is None:
        raise UsageError(
            "no MODEL", f"mambactl {command.name} MODEL, or {next(iter(instead.values()))}"
        )
    return console.read_model(model)
