"""Inputs of a report: named files, those beside checkpoints, and short names.

Names of models are as short as tells them apart, and no two are alike.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from mambactl.errors import UsageError
from mambactl.evaluation.probes import PROBES
from mambactl.files import LEDGER, RESULTS, SINGLE_FILE_SUFFIXES
from mambactl.json_values import AnyObject, JsonObject
from mambactl.report.entries import (
    Entry,
    Found,
    Ledger,
    ledger_of,
    read_entries,
    stored_name,
)
from mambactl.report.kept_results import read_content

CHANGED = "the checkpoint has changed since this was measured"


def collect(paths: Sequence[Path], digest_of: Callable[[Path], str] | None = None) -> Found:
    """Read results (.json), ledgers (.jsonl), folders of results, and checkpoints with what is kept
    beside them.

    What lies beside a checkpoint is about that one, wherever it was when it was measured.
    `digest_of` a checkpoint tells whether results beside it are about what it holds now; those of
    another state are marked. Raises UsageError for a path that holds nothing.
    """
    entries: list[Entry] = []
    ledgers: list[Ledger] = []
    read: set[str] = set()
    for path in dict.fromkeys(paths):
        files = [path] if path.suffix in (".json", ".jsonl") else kept_beside(path)
        run = [] if files else kept_in_run(path)
        files = files or run
        if not files:
            raise UsageError(
                f"nothing measured is kept beside {path}",
                "give a results .json, a metrics.jsonl, or a checkpoint that was evaluated",
            )
        for file in files:
            # a checkpoint and its folder of results, say
            real = os.path.realpath(file)
            if real in read:
                continue
            read.add(real)
            if file.suffix == ".jsonl":
                ledgers.append(ledger_of(file))
                continue
            found = list(read_entries(file))
            if file in run:
                # a section's record says again what is kept beside its checkpoint
                found = [each for each in found if each.metrics not in [e.metrics for e in entries]]
            if not found and file == path:
                raise UsageError(
                    f"{file} holds no measurement", "give what eval, bench or spec-decode wrote"
                )
            named = file == path or _holds_results(path) or file in run
            checkpoint = None if named else path
            entries += [
                _owned(entry, _owner(entry, file, checkpoint), digest_of) for entry in found
            ]
    return named_apart(Found(entries, ledgers))


def _owner(entry: Entry, file: Path, checkpoint: Path | None) -> Path | None:
    """The checkpoint that results lie beside.

    Without `checkpoint`, only where the name of the folder says whose results it holds.
    """
    if checkpoint is not None or not _holds_results(file.parent):
        return checkpoint
    folder, measured = file.parent, str(entry.about.get("checkpoint") or "")
    owner = folder.parent
    if folder.name != RESULTS:
        owner = folder.with_name(folder.name.removesuffix(f".{RESULTS}"))
    # a page has such a folder too, with results of many models
    known = owner.name == Path(measured).name or owner.suffix in SINGLE_FILE_SUFFIXES
    return owner if measured and known else None


def _owned(entry: Entry, owner: Path | None, digest_of: Callable[[Path], str] | None) -> Entry:
    """The entry under the name of its owner, marked where that has changed."""
    if owner is None:
        return entry
    if entry.about.get("checkpoint"):
        entry = replace(entry, model=stored_name(str(owner), entry.metrics))
    if digest_of is None or not os.path.exists(owner):
        return entry
    return _marked(entry, digest_of(owner))


def _holds_results(path: Path) -> bool:
    """True if a path is named like the results folder of a checkpoint."""
    return path.name == RESULTS or path.name.endswith(f".{RESULTS}")


def _marked(entry: Entry, digest: str) -> Entry:
    measured = dict(entry.source.details).get("digest", digest)
    if measured == digest:
        return entry
    details = (*entry.source.details, ("attention", CHANGED))
    return replace(entry, source=replace(entry.source, details=details))


def kept_beside(checkpoint: Path) -> list[Path]:
    """Results and ledger of a folder or a single file, or what a folder of results holds."""
    if not checkpoint.name:
        # the root of all folders lies beside nothing
        return []
    if _holds_results(checkpoint):
        return sorted(checkpoint.glob("*.json"))
    results = [checkpoint / RESULTS, checkpoint.with_name(f"{checkpoint.name}.{RESULTS}")]
    ledgers = [checkpoint / LEDGER, checkpoint.with_name(f"{checkpoint.name}.{LEDGER}")]
    found = [file for folder in results for file in sorted(folder.glob("*.json"))]
    return found + [file for file in ledgers if os.path.isfile(file)]


def kept_in_run(folder: Path) -> list[Path]:
    """Results in the folder of `recipe run`: beside checkpoints, then records."""
    records = [file for file in sorted(folder.glob("*.json")) if _is_record(file)]
    if not records:
        return []
    checkpoints = [folder / file.name.removesuffix(".json") for file in records]
    beside = [file for checkpoint in checkpoints for file in kept_beside(checkpoint)]
    return [*beside, *records]


def _is_record(file: Path) -> bool:
    """True for a file that `recipe run` wrote about a section."""
    if not os.path.isfile(file):
        return False
    try:
        return read_content(file).keys() >= {"command", "result"}
    except UsageError:
        return False


AGAINST, CONTROLS = "against", "controls"


def named_apart(found: Found) -> Found:
    """Short names of models and of what they are compared with, longer where two would be alike.

    Where students have different teachers, their data sets say which, and are no longer one.
    """
    names = [each.model for each in (*found.entries, *found.ledgers)]
    names += [name for entry in found.entries for name in _others(entry.metrics)]
    called = _short_names(names)
    entries = [
        replace(entry, model=called[entry.model], metrics=_renamed(entry.metrics, called))
        for entry in found.entries
    ]
    if len(teachers_of(entries)) > 1:
        entries = [_by_teacher(entry) for entry in entries]
    return Found(entries, [replace(each, model=called[each.model]) for each in found.ledgers])


def teachers_of(entries: Iterable[Entry]) -> list[str]:
    """Every teacher that something was measured by."""
    return list(
        dict.fromkeys(
            entry.metrics["teacher"]
            for entry in entries
            if isinstance(entry.metrics.get("teacher"), str)
            and any(map(_is_relative, entry.metrics))
        )
    )


def _others(metrics: AnyObject) -> Iterator[str]:
    """Names of a teacher, a baseline, and a student tested against."""
    against = metrics.get(AGAINST)
    other = against.get("model") if isinstance(against, Mapping) else None
    yield from (
        name
        for name in (metrics.get("teacher"), metrics.get("baseline"), other)
        if isinstance(name, str)
    )


def _renamed(metrics: AnyObject, called: Mapping[str, str]) -> JsonObject:
    new: JsonObject = {
        key: called[metrics[key]]
        for key in ("teacher", "baseline")
        if isinstance(metrics.get(key), str)
    }
    against = metrics.get(AGAINST)
    if isinstance(against, Mapping) and isinstance(against.get("model"), str):
        new[AGAINST] = {**against, "model": called[against["model"]]}
    return {**metrics, **new}


def _short_names(names: Iterable[str]) -> dict[str, str]:
    every = list(dict.fromkeys(names))
    paths = {name: str(Path(os.path.expanduser(name)).absolute()) for name in every}
    short = {name: _short(name) if _is_path(name) else name for name in every}
    owners: dict[str, set[str]] = {}
    for name, text in short.items():
        owners.setdefault(text, set()).add(paths[name])
    return {name: text if len(owners[text]) == 1 else name for name, text in short.items()}


def _short(path: str) -> str:
    """The last part, or all below the folder of runs: `quickstart/distill`."""
    above, runs, below = path.rstrip("/").rpartition("runs/")
    if runs and (not above or above.endswith("/")):
        return below
    return path.rstrip("/").rpartition("/")[2]


def _is_path(name: str) -> bool:
    return "/" in name and " " not in name


def _by_teacher(entry: Entry) -> Entry:
    teacher = entry.metrics.get("teacher")
    return replace(entry, metrics=_told_apart(entry.metrics, teacher)) if teacher else entry


def _is_relative(kind: str) -> bool:
    """True if a measurement is relative to a teacher."""
    return kind == "tests" or (kind in PROBES and PROBES[kind].teacher == "needed")


def _told_apart(metrics: AnyObject, teacher: str) -> JsonObject:
    """The measurements with the teacher in the name of every data set."""
    result = dict(metrics)
    for kind, found in metrics.items():
        if not isinstance(found, Mapping):
            continue
        if _is_relative(kind):
            result[kind] = {
                f"teacher {teacher}" if name == kind else f"{name}, teacher {teacher}": numbers
                for name, numbers in found.items()
            }
        elif kind == CONTROLS:
            result[kind] = {name: _told_apart(numbers, teacher) for name, numbers in found.items()}
        elif kind == AGAINST:
            result[kind] = _told_apart(found, teacher)
    return result
