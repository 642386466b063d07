"""Shell completion of names: models, recipes with variants, sections, tasks, stages.

Functions are called with what is typed so far and answer from names on this disk; nothing heavy is
imported. Where there is no answer the shell offers files.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import typer

from mambactl.errors import MambactlError
from mambactl.files import GGUF_SUFFIX, RESULTS, SINGLE_FILE_SUFFIXES, recipe_folder
from mambactl.plain_yaml import read_yaml

# bash breaks words at these, and replaces only what stands behind the last one
BREAKS = "@=:"
# the part of the word before that, for the functions here
PREFIX = "_MAMBACTL_PREFIX"
Suggest = Callable[[str], list[str]]
RUNS = Path("runs")


def joined_words(words: list[str], current: int) -> tuple[list[str], int, str]:
    """The words of a line that bash broke, joined again, and the start of the current one."""
    if current >= len(words):
        return words, current, ""
    kept: list[str] = []
    for word in words[: current + 1]:
        breaks = bool(word) and not word.strip(BREAKS)
        behind = bool(kept) and kept[-1].endswith(tuple(BREAKS))
        if kept and (breaks or behind):
            kept[-1] += word
        else:
            kept.append(word)
    last = kept.pop()
    cut = max(last.rfind(mark) for mark in BREAKS) + 1
    prefix, rest = last[:cut], last[cut:]
    return [*kept, rest, *words[current + 1 :]], len(kept), prefix


def _offered(names: Iterable[str], incomplete: str) -> list[str]:
    """Names that begin with what is typed, as the shell replaces it."""
    prefix = os.environ.get(PREFIX, "")
    typed = prefix + incomplete
    return [name[len(prefix) :] for name in names if name.startswith(typed)]


def models(incomplete: str) -> list[str]:
    """Aliases, checkpoints in `runs/`, and files and folders that may be models."""
    from mambactl.checkpoint.hub_names import ALIASES

    found = [*ALIASES, *_checkpoints(RUNS), *_beside(incomplete)]
    return _offered(dict.fromkeys(found), incomplete)


def drafts(incomplete: str) -> list[str]:
    """Models, and the draft that is none."""
    return [*_offered(["ngram"], incomplete), *models(incomplete)]


def recipes(incomplete: str) -> list[str]:
    """Shipped recipes and recipe files; variants where one recipe is meant."""
    names = [path.stem for path in sorted(recipe_folder().glob("*.yaml"))]
    typed = os.environ.get(PREFIX, "") + incomplete
    meant = [name for name in names if name.startswith(typed.partition("@")[0])]
    exact = [name for name in meant if name == typed.partition("@")[0]]
    found = list(names)
    for name in exact or (meant if len(meant) == 1 else []):
        found += [f"{name}@{variant}" for variant in _variants(name)]
    files = [str(path) for path in _entries(typed) if path.suffix in (".yaml", ".yml")]
    return _offered([*found, *files], incomplete)


def sections(ctx: typer.Context, incomplete: str) -> list[str]:
    """Sections of the recipe that stands on the line."""
    from mambactl.recipes import load_recipe

    # behind an option that has no value yet, arguments are not taken apart
    name = ctx.params.get("name") or next(iter(ctx.args), None)
    try:
        recipe = load_recipe(name or "")
    except MambactlError:
        return []
    return _offered([section.key for section in recipe.sections], incomplete)


def tasks(incomplete: str) -> list[str]:
    """Names of presets and of the tasks in them; the harness has more, and seconds to ask it."""
    from mambactl.evaluation.harness.presets import PRESETS

    known = [task for columns in PRESETS.values() for column in columns for task in column.tasks]
    return listed([*PRESETS, *dict.fromkeys(known)])(incomplete)


def documents(incomplete: str) -> list[str]:
    """Topics of the documents, and commands, which have a page each."""
    from mambactl.cli.topics import pages

    return _offered(pages(), incomplete)


def listed(names: Iterable[str]) -> Suggest:
    """Suggest the last of several names between commas, without those that stand there."""
    known = list(names)

    def suggest(incomplete: str) -> list[str]:
        before, comma, _ = incomplete.rpartition(",")
        given = before.split(",")
        return _offered([f"{before}{comma}{n}" for n in known if n not in given], incomplete)

    return suggest


def _variants(name: str) -> list[str]:
    try:
        content = read_yaml(recipe_folder() / f"{name}.yaml")
    except MambactlError:
        return []
    return [str(variant) for variant in (content or {}).get("variants") or {}]


def _checkpoints(folder: Path) -> Iterator[str]:
    """Checkpoints of single commands and of recipes, which have a folder of their own."""
    for path in _inside(folder):
        if _is_checkpoint(path):
            yield str(path)
        else:
            yield from (str(each) for each in _inside(path) if _is_checkpoint(each))


def _is_checkpoint(path: Path) -> bool:
    single = path.suffix in SINGLE_FILE_SUFFIXES and path.is_file()
    return single or (path / "config.json").is_file()


def _beside(incomplete: str) -> Iterator[str]:
    for path in _entries(incomplete):
        if path.suffix in (*SINGLE_FILE_SUFFIXES, GGUF_SUFFIX):
            yield str(path)
        elif path.is_dir() and not path.name.endswith(RESULTS):
            yield f"{path}/" if not _is_checkpoint(path) else str(path)


def _entries(incomplete: str) -> Iterator[Path]:
    """Entries of the typed folder, by their names as typed."""
    folder, name = os.path.split(incomplete)
    for path in _inside(Path(os.path.expanduser(folder or "."))):
        if path.name.startswith(name) and (name.startswith(".") or not path.name.startswith(".")):
            yield Path(folder) / path.name


def _inside(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []
