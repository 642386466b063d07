"""Recipe files, and how flags, `--set`, a recipe section and defaults become one configuration.

A recipe is a YAML file; its sections run in order and each key is a flag name with `_` for `-`:

    name: quickstart
    seed: 0
    stages:
      convert: {model: smollm2-135m, ratio: 0.5}
      eval: {data: [held-out.jsonl]}
      spec-decode@ngram: {draft: ngram}
      spec-decode@student:
        model: smollm2-135m
        draft: ${convert}

A section is a stage name, with `@label` to use a stage twice. Besides the stage's own keys it may
hold `model` (`target` for spec-decode; default: the checkpoint written last; none for `bench` of
shapes) and `out` (a name in the working folder, in which pages and pictures lie as well).
`${section}` stands for the checkpoint of an earlier section. Data paths are relative to the file.

A recipe is a file that somebody else may have written: it writes in the working folder alone, and
`trust_remote_code` counts only when it is on the command line too.

`variants:` keeps relatives of a recipe in its file. Each changes single options of sections, drops
a section with `null`, or adds one behind the section named before it; `like:` starts from another
variant. `NAME@VARIANT` is how one is chosen:

    variants:
      "75": {convert: {ratio: 0.75}, sft: null}
      "75-long": {like: "75", distill: {max_length: 4096}}
"""

import glob
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mambactl.commands import COMMANDS, Command, configure, stages
from mambactl.containment import is_name, require_inner
from mambactl.errors import UsageError
from mambactl.files import recipe_folder
from mambactl.foreign import excerpt
from mambactl.options import StageConfig, split_weight
from mambactl.options.fields import nearest, parse_settings
from mambactl.plain_yaml import read_yaml
from mambactl.recipe_variants import text_of, variants_of, varied

REFERENCE = re.compile(r"\$\{([\w@.-]+)\}")
LABEL = re.compile(r"[\w.-]+")
TOP_KEYS = ("name", "description", "seed", "stages", "variants")
TRUST = "trust_remote_code"


@dataclass(frozen=True)
class Section:
    """One step of a recipe: `values` holds only what the file (or `--set`) says.

    `typed` are the keys that a person gave with `--set`.
    """

    key: str
    stage: str
    model: str | None
    out: str
    values: dict[str, object]
    typed: frozenset[str] = frozenset()

    @property
    def command(self) -> Command:
        """The row of the command that the step runs."""
        return COMMANDS[self.stage]

    @property
    def options(self) -> type[StageConfig]:
        """Class of the step's options."""
        return self.command.stage_options

    @property
    def config(self) -> StageConfig:
        """The validated options of the step."""
        return configure(self.stage, self.values)

    @property
    def writes(self) -> bool:
        """True if the step writes a checkpoint or data that later ones may refer to."""
        return self.suffix is not None

    @property
    def suffix(self) -> str | None:
        """Suffix of the output, None without one."""
        return self.command.ending(self.config)

    @property
    def needs_model(self) -> bool:
        """True if the step works on a checkpoint."""
        return self.config.needs_model

    @property
    def asks_for_trust(self) -> bool:
        """True if the file, and no person, allows the code that a checkpoint ships."""
        return self.config.trust_remote_code and TRUST not in self.typed

    def origin(self, key: str) -> str:
        """Origin of the value of an option: `set`, `recipe` or `default`."""
        if key in self.typed:
            return "set"
        return "recipe" if key in self.values else "default"


@dataclass(frozen=True)
class Recipe:
    """A parsed recipe file, or one variant of it, whose every section is valid.

    `variants` are the names that the file offers.
    """

    name: str
    description: str
    path: Path
    sections: tuple[Section, ...]
    variant: str | None = None
    variants: tuple[str, ...] = ()

    @property
    def spec(self) -> str:
        """Name or path by which `load_recipe` finds it."""
        return f"{self.path}@{self.variant}" if self.variant else str(self.path)

    def section(self, stage: str) -> Section:
        """Return the section called `stage`, else the first one of that stage."""
        by_key = [s for s in self.sections if s.key == stage]
        found = by_key or [s for s in self.sections if s.stage == stage]
        if not found:
            have = ", ".join(s.key for s in self.sections)
            raise UsageError(f"recipe {self.name} has no section {stage}", f"it has: {have}")
        return found[0]


def list_recipes() -> list[Recipe]:
    """Load every recipe that comes with the package; each names its variants."""
    return [load_recipe(path) for path in sorted(recipe_folder().glob("*.yaml"))]


def load_recipe(spec: str | Path, settings: Iterable[str] = (), skip: Iterable[str] = ()) -> Recipe:
    """Read and validate a recipe file or shipped name, with `@VARIANT` if it has any.

    Settings are `section.key=value`; sections of `skip` are left out.
    """
    path, variant = _find(str(spec))
    content = _read(path)
    for key in content:
        if key not in TOP_KEYS:
            raise UsageError(f"{path}: unknown key {excerpt(key)}", nearest(key, TOP_KEYS))
    stages = content.get("stages")
    if not isinstance(stages, dict) or not stages:
        raise UsageError(f"{path}: `stages` must list at least one section")
    variants = variants_of(content, path)
    description = text_of(content, "description", "", path)
    if variant is not None:
        stages, special = varied(stages, variants, variant, path)
        description = special or description
    seed = {"seed": content["seed"]} if "seed" in content else {}
    sections = tuple(_section(key, body, seed, path) for key, body in stages.items())
    sections = _without(_override(sections, settings, path), skip, path)
    _check_references(sections, path)
    _check_outputs(sections, path)
    name = text_of(content, "name", path.stem, path)
    if not is_name(name) and "name" in content:
        raise UsageError(
            f"{path}: {excerpt(name)!r} is no plain name", "use letters, digits, - _ and ."
        )
    if variant is not None:
        name = f"{name}@{variant}"
    return Recipe(name, description, path, sections, variant, tuple(variants))


def substitute(value: object, outputs: Mapping[str, str]) -> Any:
    """Replace `${section}` in a string, or in the strings of a list, by that section's output."""
    if isinstance(value, list):
        return [substitute(item, outputs) for item in value]
    if not isinstance(value, str):
        return value
    return REFERENCE.sub(lambda match: outputs[match[1]], value)


def resolved(recipe: Recipe) -> dict[str, dict[str, tuple[object, str]]]:
    """Return for each section every key with its value and its origin, `recipe` or `default`."""
    whole = {}
    for section in recipe.sections:
        origin = "set" if set(section.command.model_keys) & section.typed else "recipe"
        head = {"model": (section.model, origin)} if section.model else {}
        config = section.config.model_dump(mode="json")
        whole[section.key] = head | {k: (v, section.origin(k)) for k, v in config.items()}
    return whole


def _find(spec: str) -> tuple[Path, str | None]:
    """The file and the variant that is asked for; a path may hold an @ of its own."""
    base, at, variant = spec.rpartition("@")
    choices = ((spec, None), (base, variant)) if at else ((spec, None),)
    # functions of os.path know no failure: what cannot be looked for is not there
    for there in (os.path.isfile, os.path.exists):
        for name, chosen in choices:
            path = os.path.expanduser(name)
            for file in (path, os.path.join(recipe_folder(), f"{name}.yaml")):
                if name and there(file):
                    return Path(file).resolve(), chosen
    names = [path.stem for path in recipe_folder().glob("*.yaml")]
    raise UsageError(f"no recipe file or name {excerpt(spec)}", nearest(base or spec, names))


def _read(path: Path) -> dict[str, object]:
    content = _named(read_yaml(path))
    if not isinstance(content, dict):
        raise UsageError(f"{path} is not a recipe: it must be a mapping with `stages`")
    return content


def _named(value: object) -> object:
    """The value with text for every key: `75:` and `"75":` are one name."""
    if isinstance(value, list):
        return [_named(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _named(item) for key, item in value.items()}
    return value


def _section(key: str, body: object, seed: dict[str, object], path: Path) -> Section:
    stage, at, label = key.partition("@")
    if stage not in (known := stages()):
        raise UsageError(f"{path}: {excerpt(key)} is not a stage", nearest(stage, known))
    if at and not LABEL.fullmatch(label):
        raise UsageError(
            f"{path}: {excerpt(key)} has the label {excerpt(label)!r}",
            "a label is letters, digits, - _ and .",
        )
    if not isinstance(body, dict | None):
        raise UsageError(f"{path}: {key} must be a mapping of options")
    section = Section(key, stage, None, key.replace("@", "-"), dict(seed))
    section = _take(section, body or {}, path)
    require_inner(section.out, f"{path}: `out` of {key}")
    for name in sorted(section.options.written & section.values.keys()):
        require_inner(str(section.values[name]), f"{path}: `{name}` of {key}")
    return section


def _take(section: Section, body: Mapping[str, object], path: Path) -> Section:
    values = {key.replace("-", "_"): value for key, value in body.items()}
    section = _placed(section, values, path)
    for field in section.options.files:
        if field in values:
            values[field] = _located(values[field], path.parent)
    section = replace(section, values={**section.values, **values})
    try:
        suffix = section.suffix or ""
    except UsageError as error:
        raise UsageError(f"{path}: {error}", error.hint) from None
    return section if section.out.endswith(suffix) else replace(section, out=section.out + suffix)


def _placed(section: Section, values: dict[str, object], path: Path) -> Section:
    """The section with its model and output, which are taken out of `values`."""
    for key in (*section.command.model_keys, "out"):
        if key not in values:
            continue
        value, what = values.pop(key), f"{path}: `{key}` of {section.key}"
        if not isinstance(value, str | int | float) or str(value) in ("", "-"):
            raise UsageError(f"{what} must be a name or path")
        if str(value).startswith("-"):
            shown = excerpt(str(value))
            raise UsageError(
                f"{what} is {shown}: a hyphen begins an option", f"give it as ./{shown}"
            )
        section = replace(section, **{"out" if key == "out" else "model": str(value)})
    return section


def _located(value: object, folder: Path) -> object:
    if isinstance(value, list):
        return [_located(item, folder) for item in value]
    if isinstance(value, str) and _is_beside(folder, split_weight(value)[0]):
        return str(folder / value)
    return value


def _is_beside(folder: Path, spec: str) -> bool:
    """True if a data set lies below a folder: a file, files of a pattern, a folder or its split."""
    if "\0" in spec:
        return False
    path = folder / spec
    if os.path.isfile(path) or (glob.has_magic(spec) and glob.glob(str(path), recursive=True)):
        return True
    return any(os.path.isdir(name) for name in (path, str(path).rpartition("@")[0]))


def _override(
    sections: tuple[Section, ...], settings: Iterable[str], path: Path
) -> tuple[Section, ...]:
    by_key = {section.key: section for section in sections}
    for name, value in parse_settings(settings).items():
        # stage names keep their hyphen; parse_settings turned it into an underscore
        owner = next((key for key in by_key if name.startswith(key.replace("-", "_") + ".")), None)
        if owner is None:
            keys = ", ".join(by_key)
            raise UsageError(f"--set {name}: give section.key=value", f"sections: {keys}")
        key = name[len(owner) + 1 :]
        section = _take(by_key[owner], {key: value}, path)
        by_key[owner] = replace(section, typed=section.typed | {key})
    return tuple(by_key.values())


def _without(sections: tuple[Section, ...], skip: Iterable[str], path: Path) -> tuple[Section, ...]:
    keys = [section.key for section in sections]
    dropped = set(skip)
    for key in sorted(dropped - set(keys)):
        raise UsageError(f"{path} has no section {excerpt(key)}", nearest(key, keys))
    return tuple(section for section in sections if section.key not in dropped)


def _check_references(sections: tuple[Section, ...], path: Path) -> None:
    written: list[str] = []
    for section in sections:
        for name in REFERENCE.findall(f"{section.model} {section.values}"):
            if name not in written:
                hint = f"checkpoints before it: {excerpt(', '.join(written)) or 'none'}"
                raise UsageError(f"{path}: {section.key} refers to ${{{name}}}", hint)
        if section.model is not None and not section.needs_model:
            raise UsageError(f"{path}: {section.key} works without a model", "drop its `model:`")
        if section.needs_model and section.model is None and not written:
            raise UsageError(f"{path}: {section.key} has no model", "give the first stage `model:`")
        if section.writes:
            written.append(section.key)


def _check_outputs(sections: tuple[Section, ...], path: Path) -> None:
    """Raise UsageError for two sections whose results or records would be one file."""
    writers: dict[str, str] = {}
    for section in sections:
        if (other := writers.setdefault(section.out, section.key)) != section.key:
            raise UsageError(
                f"{path}: {other} and {section.key} both write {section.out}",
                "give one of them another `out:`",
            )
