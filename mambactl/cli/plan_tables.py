"""The plan of a dry run for a person: a table of values, and one for every list of things."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import TypeGuard

from mambactl import console
from mambactl.units import decimal_size, duration

# characters of a value beyond which a table is no help
LONGEST = 400
MOST_COLUMNS = 6
# numbers that count nothing
NAMES = ("port", "seed")


def show_plan(stage: str, plan: Mapping[str, object]) -> None:
    """Print a plan as tables on stderr, also where warnings alone are shown."""
    values: list[tuple[str, str]] = []
    lists: list[tuple[str, list[Mapping[str, object]]]] = []
    for name, value in _flat(plan):
        if isinstance(value, list) and value and all(isinstance(each, Mapping) for each in value):
            lists.append((name, value))
        elif value is not None and value != []:
            values.append((_words(name), _text(name, value)))
    # no table: a path that is broken over lines cannot be copied
    width = max((len(name) for name, _ in values), default=0)
    console.log(f"{stage} would run with", level=0)
    for name, text in values:
        console.log(f"  {name:<{width}}  {text}", level=0)
    tables = []
    for name, rows in lists:
        tables.append(_listed(_words(name), [dict(_leaves(row)) for row in rows]))
        for row in rows:
            for inner, listed in row.items():
                if _is_table(listed):
                    title = f"{_words(name)} {row.get('name', '')}: {_words(inner)}"
                    tables.append(_listed(title, listed))
    for each in tables:
        console.show(each, level=0)


def _listed(title: str, rows: Sequence[Mapping[str, object]]) -> object:
    """A row for each; a column for each where they say more than a line holds."""
    names = list(dict.fromkeys(key for row in rows for key in row))
    cells = [
        [_text(key, row[key]) if row.get(key) is not None else "" for key in names] for row in rows
    ]
    headings = [_words(key) for key in names]
    if len(names) > MOST_COLUMNS:
        headings, *cells = ([head, *found] for head, *found in zip(headings, *cells, strict=True))
    return console.grid(title, headings, cells, numbers=True)


def _flat(plan: Mapping[str, object], above: str = "") -> Iterator[tuple[str, object]]:
    for key, value in plan.items():
        name = f"{above} {key}".strip()
        if isinstance(value, Mapping):
            yield from _flat(value, name)
        else:
            yield name, value


def _leaves(row: Mapping[str, object]) -> Iterator[tuple[str, object]]:
    return ((name, value) for name, value in _flat(row) if not _is_table(value))


def _is_table(value: object) -> TypeGuard[Sequence[Mapping[str, object]]]:
    return isinstance(value, list) and bool(value) and isinstance(value[0], Mapping)


def _words(name: str) -> str:
    return name.replace("_", " ")


def _text(name: str, value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return _counted(value)
    if name.endswith("bytes") or " memory " in f" {name} ":
        return decimal_size(value) if isinstance(value, int) else str(value)
    if name.endswith("seconds") and isinstance(value, int | float):
        return duration(value)
    if isinstance(value, int) and name not in NAMES:
        return f"{value:,}"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _counted(values: Sequence[object]) -> str:
    """`mamba2 x3, attention`: neighbours that are equal together."""
    parts = []
    for value, alike in groupby(map(str, values)):
        times = len(list(alike))
        parts.append(f"{value} x{times}" if times > 1 else value)
    text = ", ".join(parts)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."
