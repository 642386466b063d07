"""Measurements as they are kept: results of a stage, of a recipe, of several runs, and ledgers."""

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from mambactl.evaluation.probes import PROBES
from mambactl.files import LEDGER, SINGLE_FILE_SUFFIXES
from mambactl.json_values import AnyObject, JsonObject
from mambactl.metrics import KL
from mambactl.report.kept_results import read_content, read_ledger, require_measured
from mambactl.report.origin import command_of, lineage_of

Json = JsonObject

# what is known of how a measurement was made, also where it stands among the numbers
ABOUT = ("device", "date", "versions", "teacher")
# how the measured model's weights were rounded, where they were
WEIGHTS = "weights"
# what a measurement of speed has at least one of
SPEEDS = ("points", "speculative", "kernels", "loss")


@dataclass(frozen=True)
class Source:
    """Source of numbers: a file, a member of it, and the known facts about their making.

    `details` are pairs to print: device, date, version, digest of the model.
    """

    file: str
    member: str = ""
    command: str = ""
    details: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Entry:
    """Measurements of one run of one stage on one model."""

    model: str
    metrics: Json
    source: Source
    about: Json


@dataclass(frozen=True)
class Ledger:
    """The lines of a metrics.jsonl and the model that was trained."""

    model: str
    lines: list[Json]
    source: Source


@dataclass(frozen=True)
class Found:
    """Everything a report is made of, in the order it was given."""

    entries: list[Entry]
    ledgers: list[Ledger]


def against_of(entry: Entry) -> str:
    """The name of the student that an entry was tested against, empty without one."""
    other = entry.metrics.get("against") or {}
    return str(other.get("model", ""))


def stored_name(model: str, metrics: AnyObject) -> str:
    """The name of a checkpoint whose weights may have been rounded for a measurement."""
    return f"{model}@{metrics[WEIGHTS]}" if metrics.get(WEIGHTS) else model


def read_entries(path: Path) -> Iterator[Entry]:
    """Every measurement of a JSON file; raises UsageError for what is none, or of another shape."""
    yield from _walk(read_content(path), {}, Source(str(path)))


def _walk(node: object, above: Json, source: Source) -> Iterator[Entry]:
    if not isinstance(node, Mapping):
        return
    about = above | {key: value for key, value in node.items() if not isinstance(value, Mapping)}
    about |= {key: node[key] for key in ("versions", "model") if isinstance(node.get(key), dict)}
    probes = [name for name, probe in PROBES.items() if not probe.within]
    for measured in (node.get("metrics"), node):
        # options may be called like what they ask for, and are lists
        if isinstance(measured, Mapping) and (
            any(isinstance(measured.get(kind), Mapping) for kind in probes)
            or any(isinstance(measured.get(kind), Mapping | list) for kind in SPEEDS)
        ):
            yield _entry(measured, about, source)
            return
    commands = node["commands"] if isinstance(node.get("commands"), Mapping) else {}
    for member, part in _parts(node):
        # sections of a recipe are named like their commands
        command = commands.get(member.removeprefix("sections."))
        given = {"command": command} if command else {}
        where = replace(source, member=f"{source.member} {member}".strip())
        yield from _walk(part, about | given, where)


def _parts(node: AnyObject) -> Iterator[tuple[str, object]]:
    """Members, the elements of lists, and sections, each with its path."""
    for key, value in node.items():
        if key == "sections" and isinstance(value, Mapping):
            yield from ((f"{key}.{name}", part) for name, part in value.items())
        elif isinstance(value, list):
            yield from ((f"{key}[{index}]", part) for index, part in enumerate(value))
        else:
            yield key, value


def _entry(metrics: AnyObject, about: Json, source: Source) -> Entry:
    require_measured(metrics, about, " ".join(filter(None, (source.file, source.member))))
    merged = about | {key: metrics[key] for key in ABOUT if key in metrics}
    commands = about.get("commands")
    last = commands[-1:] if isinstance(commands, list) else []
    command = about.get("command") or "".join(last)
    words = command if isinstance(command, list) else [command]
    text = shlex.join(words) if len(words) > 1 else str(words[0])
    found = replace(source, command=text, details=tuple(_details(merged)))
    return Entry(_model(metrics, about), _normal(metrics), found, merged)


def _details(about: Json) -> Iterator[tuple[str, str]]:
    versions = about.get("versions") or {}
    if isinstance(about.get("version"), str):
        versions = {"mambactl": about["version"]} | versions
    model = about["model"] if isinstance(about.get("model"), dict) else {}
    pairs = {
        "device": about.get("device") or about.get("gpu") or about.get("machine"),
        "date": about.get("created") or about.get("date"),
        "versions": ", ".join(f"{name} {number}" for name, number in versions.items() if number),
        "model": about.get("checkpoint"),
        "digest": model.get("digest"),
        "teacher": about.get("teacher"),
    }
    yield from ((name, str(value)) for name, value in pairs.items() if value)


def _model(metrics: AnyObject, about: Json) -> str:
    if about.get("name"):
        return str(about["name"])
    if about.get("checkpoint"):
        return stored_name(str(about["checkpoint"]).rstrip("/"), metrics)
    config = metrics.get("config") or {}
    parts = [part for part in ("kernels", "loss") if config.get(part)]
    return ", ".join(config.get("synthetic") or parts or [str(about.get("stage", "model"))])


def _normal(metrics: AnyObject) -> Json:
    """Fidelity is by data set, also where a file has that of a single one without its name."""
    fidelity = metrics.get("fidelity")
    if isinstance(fidelity, Mapping) and KL.name in fidelity:
        controls = metrics.get("controls") or {}
        sets = [name for each in controls.values() for name in each.get("fidelity", {})]
        return {**metrics, "fidelity": {sets[0] if sets else "held-out": fidelity}}
    return dict(metrics)


def ledger_of(path: Path) -> Ledger:
    """A ledger is called after the checkpoint it lies in or beside."""
    beside = path.name.removesuffix(f".{LEDGER}") if path.name != LEDGER else ""
    model = path.with_name(beside) if beside.endswith(SINGLE_FILE_SUFFIXES) else path
    model = path.parent if path.name == LEDGER else model
    # first of all: what is no regular file must not be opened as a checkpoint
    lines = read_ledger(path)
    lineage = lineage_of(model)
    about = {**lineage, "date": lineage.get("created"), "checkpoint": str(model), "model": {}}
    details = tuple(_details(about)) if lineage else (("command", _unknown(model)),)
    source = Source(str(path), "", command_of(lineage), details)
    return Ledger(str(model), lines, source)


def _unknown(model: Path) -> str:
    return "not known" + ("" if model.exists() else f": it is kept in {model}, which is not there")
