"""`recipe run --data --held-out`: a person's own text in the place of a recipe's."""

import os
from collections.abc import Iterator, Sequence

from mambactl.errors import UsageError
from mambactl.options.fields import as_yaml
from mambactl.recipes import Recipe, Section

# options of sections that hold text to learn from, and text to measure on; preferences are neither
LEARNED = {
    "convert": ("calibrate", "select_data"),
    "teacher-cache": ("data",),
    "distill": ("data",),
    "sft": ("data",),
}
HELD_OUT = {"distill": ("eval_data",), "sft": ("eval_data",), "eval": ("data",)}


def data_settings(recipe: Recipe, data: Sequence[str], held_out: Sequence[str]) -> list[str]:
    """The settings `section.option=[...]` of both; raises UsageError where a recipe has no use."""
    found: list[str] = []
    for flag, given, options in (("--data", data, LEARNED), ("--held-out", held_out, HELD_OUT)):
        if not given:
            continue
        value = as_yaml([_placed(spec) for spec in given])
        named = [f"{name}={value}" for each in recipe.sections for name in _taken(each, options)]
        if not named:
            raise UsageError(f"recipe {recipe.name} has no section for {flag}", f"drop {flag}")
        found += named
    return found


def _taken(section: Section, options: dict[str, tuple[str, ...]]) -> Iterator[str]:
    for name in options.get(section.stage, ()):
        if section.values.get(name):
            yield f"{section.key}.{name}"


def _placed(spec: str) -> str:
    """A file by its absolute name: in a recipe a relative one starts at the recipe's folder."""
    path = os.path.expanduser(spec)
    return os.path.abspath(path) if os.path.exists(path) else spec
