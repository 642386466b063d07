"""`recipe run`: one child process per section, so that memory and GPUs are free between stages."""

import json
import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import typer

from mambactl import console
from mambactl.cli.precedence import settled
from mambactl.cli.processes import signals_passed_to
from mambactl.containment import require_inside
from mambactl.errors import OutputError, UsageError
from mambactl.files import replacing
from mambactl.foreign import read_object
from mambactl.json_values import JsonObject
from mambactl.options.fields import as_yaml, nearest, parse_settings
from mambactl.ranks import child_environment
from mambactl.recipes import TRUST, Recipe, Section, substitute

# the record of a section that has to run again
STALE = {"command": None, "result": None}
_ALLOW = "--trust-remote-code"
_ASKS = f"asks to run code that a checkpoint ships ({TRUST})"


@dataclass(frozen=True)
class Handling:
    """Options for running sections: `flags` of all stages, and `again`, the command to repeat it.

    `trusted`: a person allows the code that checkpoints ship, where the recipe asks for it.
    """

    flags: tuple[str, ...]
    resume: bool
    force: bool
    trusted: bool
    json: bool
    again: str


@dataclass(frozen=True)
class Plan:
    """Sections to run, their outputs, and the fate of earlier results."""

    recipe: Recipe
    folder: Path
    sections: tuple[Section, ...]
    outputs: dict[str, str]
    how: Handling


def make_plan(
    recipe: Recipe, folder: Path, first: str | None, last: str | None, how: Handling
) -> Plan:
    """Select sections `first` to `last` and fix every output path."""
    keys = [section.key for section in recipe.sections]
    for name in (first, last):
        if name is not None and name not in keys:
            raise UsageError(f"recipe {recipe.name} has no section {name}", nearest(name, keys))
    start = keys.index(first) if first else 0
    end = keys.index(last) + 1 if last else len(keys)
    if start >= end:
        raise UsageError(f"--from {first} comes after --to {last}", f"order: {', '.join(keys)}")
    outputs = {s.key: str((folder / s.out).absolute()) for s in recipe.sections if s.writes}
    _require_inside(recipe, folder)
    for section in recipe.sections[:start]:
        if section.writes and not Path(outputs[section.key]).exists():
            hint = f"{how.again} --to {section.key}"
            raise UsageError(f"--from {first} needs {outputs[section.key]}", hint)
    chosen = recipe.sections[start:end]
    return Plan(recipe, folder, chosen, outputs, how)


def _require_inside(recipe: Recipe, folder: Path) -> None:
    """Raise UsageError where links in the working folder lead what a recipe writes out of it."""
    for section in recipe.sections:
        if "out" not in section.typed:
            require_inside(folder / section.out, folder)
        for name in _placed(section):
            require_inside(folder / str(section.values[name]), folder)


def _placed(section: Section) -> list[str]:
    """Options whose files lie in the working folder, as the recipe names them, not a person."""
    return sorted((section.options.written & section.values.keys()) - section.typed)


def commands(plan: Plan) -> tuple[dict[str, list[str]], str | None]:
    """The command line of every section that runs, and the checkpoint that is left at the end."""
    found: dict[str, list[str]] = {}
    checkpoint = source = None
    keys = [section.key for section in plan.sections]
    for section in plan.recipe.sections:
        if section.needs_model:
            source = substitute(section.model, plan.outputs) or checkpoint
        if section.command.writes == "model":
            checkpoint = plan.outputs[section.key]
        if section.key in keys:
            found[section.key] = _command(plan, section, source if section.needs_model else None)
    return found, checkpoint or source


def show_plan(plan: Plan, lines: dict[str, list[str]]) -> None:
    """Print the command lines of a plan, and what they would need to run."""
    for number, (key, command) in enumerate(lines.items(), 1):
        console.log(f"[{number}/{len(lines)}] {shlex.join(command)}")
        if plan.recipe.section(key).asks_for_trust and not plan.how.trusted:
            console.warn(f"{key} {_ASKS}, which takes {_ALLOW}")


def run_plan(plan: Plan) -> tuple[str | None, dict[str, object]]:
    """Run the sections in order; returns the last checkpoint (None where there was none at all)
    and every section's result.
    """
    _require_trust(plan)
    results: dict[str, object] = {}
    renewed = False
    lines, checkpoint = commands(plan)
    for number, section in enumerate(plan.sections, 1):
        command = lines[section.key]
        console.log(f"[{number}/{len(lines)}] {shlex.join(command)}")
        done = None if renewed else _done(plan, section, command)
        if done is None:
            # what was measured on an older checkpoint says nothing about a new one
            renewed = renewed or section.writes
            done = _run_section(plan, section, command)
        results[section.key] = done
    return checkpoint, results


def _require_trust(plan: Plan) -> None:
    for section in plan.sections:
        if section.asks_for_trust and not plan.how.trusted:
            raise UsageError(
                f"{plan.recipe.path}: {section.key} {_ASKS}",
                f"read the recipe first (--dry-run); if you trust it, add {_ALLOW} "
                f"or --set {section.key}.{TRUST}=true",
            )


def _command(plan: Plan, section: Section, source: str | None) -> list[str]:
    command = ["mambactl", section.stage]
    if source is not None:
        command.append(source)
    if section.writes:
        command += ["-o", plan.outputs[section.key]]
    typed = {key: value for key, value in section.values.items() if key in section.typed}
    below = {key: value for key, value in section.values.items() if key not in typed}
    values = settled(section.stage, below, typed)
    for key in _placed(section):
        values[key] = str((plan.folder / str(values[key])).absolute())
    for key, raw in values.items():
        value = substitute(raw, plan.outputs)
        text = value if isinstance(value, str) and _is_plain(value) else as_yaml(value)
        command += ["--set", f"{key}={text}"]
    return command


def _is_plain(text: str) -> bool:
    return parse_settings([f"key={text}"]) == {"key": text}


def _run_section(plan: Plan, section: Section, command: list[str]) -> JsonObject:
    # a stage does not continue what was made differently, and says so
    force = plan.how.force or (plan.how.resume and _stale(plan, section, command))
    flags = list(plan.how.flags)
    if section.writes:
        flags += ["--force"] if force else ["--resume"] * plan.how.resume
    code, line = _child([sys.executable, "-m", *command, *flags, "--json"], plan.how.json)
    if code != 0:
        if not plan.how.json:
            console.warn(f"{section.key} failed; after mending: {plan.how.again} --resume")
        raise typer.Exit(code)
    result = json.loads(line)
    if "text" in result:
        console.log(result["text"])
    if section.writes and force:
        # before its own record, so that a kill in between repeats work rather than skips it
        for later in plan.recipe.sections[plan.recipe.sections.index(section) + 1 :]:
            _save(_record(plan, later), STALE)
    _save(_record(plan, section), {"command": command, "result": result})
    return result


def _stale(plan: Plan, section: Section, command: list[str]) -> bool:
    """True if the section ran here with other options, or on an input that was replaced since."""
    record = _record(plan, section)
    return record.exists() and _read(record).get("command") != command


def _record(plan: Plan, section: Section) -> Path:
    return plan.folder / f"{section.out}.json"


def _done(plan: Plan, section: Section, command: list[str]) -> JsonObject | None:
    record = _record(plan, section)
    if plan.how.force:
        _save(record, STALE)
        return None
    if not record.exists():
        return None
    if not plan.how.resume:
        hint = f"{plan.how.again} --resume, or --force, or another --out"
        raise OutputError(f"{record} exists: {section.key} ran in this folder before", hint)
    missing = section.writes and not Path(plan.outputs[section.key]).exists()
    if missing or _stale(plan, section, command):
        return None
    console.log(f"{section.key}: done before, kept")
    return _read(record).get("result")


def _read(record: Path) -> JsonObject:
    """Read the record that a section left; raises OutputError for a file that is none."""
    again = "--force runs everything again, --out works in another folder"
    found = read_object(record, OutputError, again)
    if not isinstance(found.get("result"), dict | None):
        raise OutputError(f"{record} is no record of a section", again)
    return found


def _save(record: Path, content: Mapping[str, object]) -> None:
    record.parent.mkdir(parents=True, exist_ok=True)
    with replacing(record) as new:
        new.write_text(json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8")


def _child(command: list[str], json_errors: bool = False) -> tuple[int, str]:
    env = child_environment(None if json_errors else {console.PLAIN_ERRORS: "1"})
    # a group of its own: a signal reaches it once, through us, and it can save its state
    with (
        subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
            process_group=0,
            env=env,
        ) as process,
        signals_passed_to([process]),
    ):
        line, _ = process.communicate()
    code = process.returncode
    return (128 - code if code < 0 else code), line
