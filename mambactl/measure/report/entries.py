"""Measurements as they are kept: results of a stage, of a recipe, of several runs, and ledgers."""

import json
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mambactl.errors import UsageError
from mambactl.measure.plots import read_ledger
from mambactl.measure.report.lineage import command_of, read_lineage

Json = dict[str, Any]

LEDGER = "metrics.jsonl"
RESULTS = "results"
CHANGED = "the checkpoint has changed since this was measured"
# what a measurement has at least one of
KINDS = (
    "fidelity",
    "recall",
    "tasks",
    "needle",
    "long_context",
    "generation",
    "preferences",
    "points",
    "speculative",
    "kernels",
    "loss",
)


@dataclass(frozen=True)
class Source:
    """Where numbers come from: a file, a place in it, and what is known about how they were made.

    `details` are pairs to print: device, date, version, digest of the model.
    """

    file: str
    place: str = ""
    command: str = ""
    details: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Entry:
    """What one run of one stage measured on one model."""

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
    """The short name of the student that an entry was tested against, empty without one."""
    other = entry.metrics.get("against") or {}
    return str(other.get("model", "")).rstrip("/").rpartition("/")[2]


def collect(paths: Sequence[Path], digest_of: Callable[[Path], str] | None = None) -> Found:
    """Read results (.json), ledgers (.jsonl), and checkpoints with what is kept beside them.

    `digest_of` a checkpoint tells whether results beside it are about what it holds now; those of
    another state are marked. Raises UsageError for a path that holds nothing.
    """
    entries: list[Entry] = []
    ledgers: list[Ledger] = []
    for path in dict.fromkeys(paths):
        files = [path] if path.suffix in (".json", ".jsonl") else kept_beside(path)
        if not files:
            raise UsageError(
                f"nothing measured is kept beside {path}",
                "give a results .json, a metrics.jsonl, or a checkpoint that was evaluated",
            )
        for file in files:
            if file.suffix == ".jsonl":
                ledgers.append(_ledger(file))
                continue
            found = list(read_entries(file))
            if not found and file == path:
                raise UsageError(
                    f"{file} holds no measurement", "give what eval, bench or spec-decode wrote"
                )
            if file != path and digest_of is not None and path.exists():
                digest = digest_of(path)
                found = [_marked(entry, digest) for entry in found]
            entries += found
    return _named_apart(Found(entries, ledgers))


def _marked(entry: Entry, digest: str) -> Entry:
    measured = dict(entry.source.details).get("digest", digest)
    if measured == digest:
        return entry
    details = (*entry.source.details, ("attention", CHANGED))
    return replace(entry, source=replace(entry.source, details=details))


def kept_beside(checkpoint: Path) -> list[Path]:
    """Results and ledger of a folder or of a single file, in a fixed order."""
    results = [checkpoint / RESULTS, checkpoint.with_name(f"{checkpoint.name}.{RESULTS}")]
    ledgers = [checkpoint / LEDGER, checkpoint.with_name(f"{checkpoint.name}.{LEDGER}")]
    found = [file for folder in results for file in sorted(folder.glob("*.json"))]
    return found + [file for file in ledgers if file.is_file()]


def read_entries(path: Path) -> Iterator[Entry]:
    """Every measurement of a JSON file; raises UsageError for what is no JSON."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    except ValueError:
        raise UsageError(f"{path} is not JSON", "give what eval or bench wrote") from None
    yield from _walk(content, {}, Source(str(path)))


def _walk(node: Any, above: Json, source: Source) -> Iterator[Entry]:
    if not isinstance(node, Mapping):
        return
    about = above | {key: value for key, value in node.items() if not isinstance(value, Mapping)}
    about |= {key: node[key] for key in ("versions", "model") if isinstance(node.get(key), dict)}
    for measured in (node.get("metrics"), node):
        if isinstance(measured, Mapping) and any(
            isinstance(measured.get(kind), Mapping | list) for kind in KINDS
        ):
            yield _entry(measured, about, source)
            return
    commands = node["commands"] if isinstance(node.get("commands"), Mapping) else {}
    for place, part in _parts(node):
        # sections of a recipe are named like their commands
        command = commands.get(place.removeprefix("sections."))
        given = {"command": command} if command else {}
        where = replace(source, place=f"{source.place} {place}".strip())
        yield from _walk(part, about | given, where)


def _parts(node: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Members, the elements of lists, and sections, each with its place."""
    for key, value in node.items():
        if key == "sections" and isinstance(value, Mapping):
            yield from ((f"{key}.{name}", part) for name, part in value.items())
        elif isinstance(value, list):
            yield from ((f"{key}[{index}]", part) for index, part in enumerate(value))
        else:
            yield key, value


def _entry(metrics: Mapping[str, Any], about: Json, source: Source) -> Entry:
    merged = about | {key: metrics[key] for key in ("device", "date", "versions") if key in metrics}
    commands = about.get("commands")
    command = about.get("command") or (commands[-1] if isinstance(commands, list) else "")
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
    }
    yield from ((name, str(value)) for name, value in pairs.items() if value)


def _model(metrics: Mapping[str, Any], about: Json) -> str:
    if about.get("name"):
        return str(about["name"])
    if about.get("checkpoint"):
        return str(about["checkpoint"]).rstrip("/")
    config = metrics.get("config") or {}
    parts = [part for part in ("kernels", "loss") if config.get(part)]
    return ", ".join(config.get("synthetic") or parts or [str(about.get("stage", "model"))])


def _normal(metrics: Mapping[str, Any]) -> Json:
    """Fidelity is by data set, also where a file has that of a single one without its name."""
    fidelity = metrics.get("fidelity")
    if isinstance(fidelity, Mapping) and "kl" in fidelity:
        controls = metrics.get("controls") or {}
        sets = [name for each in controls.values() for name in each.get("fidelity", {})]
        return {**metrics, "fidelity": {sets[0] if sets else "held-out": fidelity}}
    return dict(metrics)


def _ledger(path: Path) -> Ledger:
    """A ledger is called after the checkpoint it lies in or beside."""
    beside = path.name.removesuffix(f".{LEDGER}") if path.name != LEDGER else ""
    model = path.with_name(beside) if beside.endswith((".st", ".safetensors")) else path
    model = path.parent if path.name == LEDGER else model
    lineage = read_lineage(model)
    about = {**lineage, "date": lineage.get("created"), "checkpoint": str(model), "model": {}}
    source = Source(str(path), "", command_of(lineage), tuple(_details(about)) if lineage else ())
    return Ledger(str(model), read_ledger(path), source)


def _named_apart(found: Found) -> Found:
    """Short names of models, or longer ones where two would be called the same."""
    names = dict.fromkeys(each.model for each in (*found.entries, *found.ledgers))
    paths: dict[str, str] = {name: str(Path(name).expanduser().absolute()) for name in names}
    short = {name: name.rpartition("/")[2] if _is_path(name) else name for name in names}
    owners: dict[str, set[str]] = {}
    for name, text in short.items():
        owners.setdefault(text, set()).add(paths[name])
    called = {n: text if len(owners[text]) == 1 else n for n, text in short.items()}
    return Found(
        [replace(each, model=called[each.model]) for each in found.entries],
        [replace(each, model=called[each.model]) for each in found.ledgers],
    )


def _is_path(name: str) -> bool:
    return "/" in name and " " not in name
