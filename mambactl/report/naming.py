"""What models are called on a page: as short as tells them apart, and no two alike."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mambactl.evaluation.probes import PROBES
from mambactl.report.entries import Entry, Found

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
    return list(dict.fromkeys(
        entry.metrics["teacher"] for entry in entries
        if isinstance(entry.metrics.get("teacher"), str)
        and any(map(_is_relative, entry.metrics))
    ))  # fmt: skip


def _others(metrics: Mapping[str, Any]) -> Iterator[str]:
    """Names of a teacher, a baseline, and a student tested against."""
    against = metrics.get(AGAINST)
    other = against.get("model") if isinstance(against, Mapping) else None
    yield from (name for name in (metrics.get("teacher"), metrics.get("baseline"), other)
                if isinstance(name, str))  # fmt: skip


def _renamed(metrics: Mapping[str, Any], called: Mapping[str, str]) -> dict[str, Any]:
    new = {key: called[metrics[key]] for key in ("teacher", "baseline")
           if isinstance(metrics.get(key), str)}  # fmt: skip
    against = metrics.get(AGAINST)
    if isinstance(against, Mapping) and isinstance(against.get("model"), str):
        new[AGAINST] = {**against, "model": called[against["model"]]}
    return {**metrics, **new}


def _short_names(names: Iterable[str]) -> dict[str, str]:
    every = list(dict.fromkeys(names))
    paths = {name: str(Path(name).expanduser().absolute()) for name in every}
    short = {name: name.rstrip("/").rpartition("/")[2] if _is_path(name) else name
             for name in every}  # fmt: skip
    owners: dict[str, set[str]] = {}
    for name, text in short.items():
        owners.setdefault(text, set()).add(paths[name])
    return {name: text if len(owners[text]) == 1 else name for name, text in short.items()}


def _is_path(name: str) -> bool:
    return "/" in name and " " not in name


def _by_teacher(entry: Entry) -> Entry:
    teacher = entry.metrics.get("teacher")
    return replace(entry, metrics=_told_apart(entry.metrics, teacher)) if teacher else entry


def _is_relative(kind: str) -> bool:
    """Whether something is measured by what a teacher says."""
    return kind == "tests" or (kind in PROBES and PROBES[kind].teacher == "needed")


def _told_apart(metrics: Mapping[str, Any], teacher: str) -> dict[str, Any]:
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
