"""Run a command from the keywords of its Python function, with the checks of the command line."""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TypeAlias, cast

from mambactl import console, invocation
from mambactl.checkpoint.provenance import made_before
from mambactl.cli.preflight import require_found
from mambactl.cli.processes import launch, of_this_run
from mambactl.commands import COMMANDS, Command
from mambactl.errors import ModelError, UsageError
from mambactl.files import default_out
from mambactl.heartbeat import heartbeat
from mambactl.options import CommandConfig, LaunchConfig, StageConfig
from mambactl.options.fields import Shown, settings
from mambactl.ranks import launched
from mambactl.stage_result import StageResult

Spec: TypeAlias = str | os.PathLike[str]


def spec_of(model: Spec) -> str:
    """A model as the command line names it; UsageError or ModelError for none at all."""
    hint = "give a path, a hub id or an alias"
    try:
        spec = os.fspath(model)
    except TypeError as error:
        raise UsageError(f"{model!r} is no model", hint) from error
    if not isinstance(spec, str) or not spec.strip() or spec == "-" or "\0" in spec:
        raise ModelError(f"{spec!r} is no model", hint)
    return spec


def make(
    name: str, config: StageConfig, model: Spec, out: Spec | None, resume: bool, force: bool
) -> StageResult:
    """Run a command that writes; `out` that is there and was made in this way counts as done."""
    if resume and force:
        raise UsageError("resume and force exclude each other", "give one of them")
    command, source, config = COMMANDS[name], spec_of(model), of_this_run(name, config)
    path = Path(out) if out else default_out(source, name, command.ending(config) or "")
    again = {"resume": resume, "force": force}
    flags = ["-o", str(path), *(f"--{word}" for word, given in again.items() if given)]
    with invocation.standing_for([name, source, *flags, *settings(config)]):
        made = made_before(path, command, config, source, resume=resume, force=force)
        if made is not None:
            return StageResult(str(path.absolute()), made.get("metrics", {}))
        require_found(config, [source] if command.reads_model else [])
        if isinstance(config, LaunchConfig) and config.is_launched and not launched():
            return _spread(command, config, [source], flags)
        with heartbeat(name):
            result = import_module(command.module).run(config, source, path, **again)
    return _located(result)


def measure(name: str, config: StageConfig, models: Sequence[Spec | None]) -> StageResult:
    """Run a command that measures; several models, or a page that is asked for, as one result."""
    sources = [None if model is None else spec_of(model) for model in models]
    if config.needs_model and None in sources:
        raise UsageError("no model", f"give one, or {' or '.join(config.without_model)}")
    if not config.needs_model and sources != [None]:
        instead = " and ".join(config.without_model)
        raise UsageError(f"{instead} work without a model", f"drop {sources[0]}, or the option")
    command, config = COMMANDS[name], of_this_run(name, config)
    named = [source for source in sources if source is not None]
    several = ["--compare"] if len(named) > 1 else []
    with invocation.standing_for([name, *named, *several, *settings(config)]):
        require_found(config, sources)
        if isinstance(config, LaunchConfig) and config.is_launched and not launched():
            return _spread(command, config, named, several)
        with heartbeat(name):
            module = import_module(command.module)
            if several or getattr(config, "report", None):
                from mambactl.report import compare

                measuring = cast(compare.MeasuringCommand, module)
                return _located(compare.run(config, sources, command=measuring))
            return _located(module.run(config, sources[0]))


def show(name: str, config: CommandConfig, *models: Spec) -> StageResult:
    """Run a command that only looks at what is there."""
    sources = [spec_of(model) for model in models]
    with invocation.standing_for([name, *sources, *_words(config)]):
        return import_module(COMMANDS[name].module).run(config, *sources)


def show_plan(name: str, config: StageConfig, model: Spec | None) -> dict[str, object]:
    """The plan of a command, which writes nothing."""
    source, command = None if model is None else spec_of(model), COMMANDS[name]
    require_found(config, [source] if command.reads_model else [])
    return import_module(command.module).plan(config, source)


def _words(config: CommandConfig) -> Iterator[str]:
    """Command-line words of some options."""
    fields = type(config).model_fields
    for name, value in config.model_dump(exclude_defaults=True).items():
        if any(isinstance(mark, Shown) and mark.positional for mark in fields[name].metadata):
            yield from value if isinstance(value, list) else [value]
        else:
            yield from [f"--{name}"] if value is True else [f"--{name}", str(value)]


def _spread(
    command: Command, config: LaunchConfig, models: Sequence[str], flags: Sequence[str]
) -> StageResult:
    """The result of several processes that run the command together."""
    loudness = {0: ["-q"], 2: ["-v"]}.get(console.verbosity(), [])
    found = json.loads(launch(config, command.name, models, [*flags, "--json", *loudness]))
    return StageResult(found["checkpoint"], found["metrics"], found.get("text"))


def _located(result: StageResult) -> StageResult:
    """The result with a path that means the same in another folder."""
    if result.path is None or not (path := Path(result.path).expanduser()).exists():
        return result
    return replace(result, path=str(path.absolute()))
