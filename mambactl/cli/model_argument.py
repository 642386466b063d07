"""MODEL: the one or several that a command line names, by argument, option or stdin."""

from typing import Any

from mambactl.cli import io
from mambactl.commands import Command
from mambactl.errors import UsageError
from mambactl.options import CommandConfig


def take_model(command: Command, given: dict[str, Any]) -> str | None:
    """Remove MODEL from the parsed parameters, and the option that means it."""
    model, option = given.pop("model", None), command.model_option
    if option is None:
        return model
    named = given.pop(option.name)
    if model is not None and named is not None:
        raise UsageError(f"MODEL and --{option.name} are the same thing", "give one of them")
    if model is not None or named is not None:
        return named if model is None else model
    if io.stdin_is_pipe():
        return "-"
    raise UsageError(f"no {option.name}", option.usage)


def take_others(command: Command, given: dict[str, Any]) -> list[str]:
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
    return io.read_model(model)
