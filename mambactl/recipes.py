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
shapes) and `out` (a name in the working folder). `${section}` stands for the checkpoint
of an earlier section. Data paths are relative to the file.

`variants:` keeps relatives of a recipe in its file. Each changes single options of sections, drops
a section with `null`, or adds one behind the section named before it; `like:` starts from another
variant. `NAME@VARIANT` is how one is chosen:

    variants:
      "75": {convert: {ratio: 0.75}, sft: null}
      "75-long": {like: "75", distill: {max_length: 4096}}
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mambactl.commands import COMMANDS, Command, configure, stages
from mambactl.errors import UsageError
from mambactl.files import recipe_folder
from mambactl.options import StageConfig, split_weight
from mambactl.options.fields import nearest, parse_settings

REFERENCE = re.compile(r"\$\{([\w@.-]+)\}")
TOP_KEYS = ("name", "description", "seed", "stages", "variants")
VARIANT_KEYS = ("like", "description")


@dataclass(frozen=True)
class Section:
    """One step of a recipe: `values` holds only what the file (or `--set`) says."""

    key: str
    stage: str
    model: str | None
    out: str
    values: dict[str, Any]

    @property
    def command(self) -> Command:
        """The row of the command that the step runs."""
        return COMMANDS[self.stage]

    @property
    def config(self) -> StageConfig:
        """The validated options of the step."""
        return configure(self.stage, self.values)

    @property
    def writes(self) -> bool:
        """Whether the step writes a checkpoint or data that later ones may refer to."""
        return self.suffix is not None

    @property
    def suffix(self) -> str | None:
        """How the name of what it writes ends, None where it writes nothing."""
        return self.command.ending(self.config)

    @property
    def needs_model(self) -> bool:
        """Whether the step works on a checkpoint."""
        return self.config.needs_model


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
        """What `load_recipe` finds it by."""
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
    """Load every recipe that comes with the package, each followed by its variants."""
    found = []
    for path in sorted(recipe_folder().glob("*.yaml")):
        recipe = load_recipe(path)
        found += [recipe, *(load_recipe(f"{path}@{name}") for name in recipe.variants)]
    return found


def load_recipe(spec: str | Path, settings: Iterable[str] = ()) -> Recipe:
    """Read and validate a recipe file or shipped name, with `@VARIANT` if it has any.

    Settings are `section.key=value`.
    """
    path, variant = _find(str(spec))
    content = _read(path)
    for key in content:
        if key not in TOP_KEYS:
            raise UsageError(f"{path}: unknown key {key}", nearest(str(key), TOP_KEYS))
    stages = content.get("stages")
    if not isinstance(stages, dict) or not stages:
        raise UsageError(f"{path}: `stages` must list at least one section")
    variants = _variants(content, path)
    description = str(content.get("description", ""))
    if variant is not None:
        stages, special = _varied(stages, variants, variant, path)
        description = special or description
    seed = {"seed": content["seed"]} if "seed" in content else {}
    sections = tuple(_section(str(key), body or {}, seed, path) for key, body in stages.items())
    sections = _override(sections, settings, path)
    _check_references(sections, path)
    name = str(content.get("name", path.stem))
    if variant is not None:
        name = f"{name}@{variant}"
    return Recipe(name, description, path, sections, variant, tuple(variants))


def _variants(content: Mapping[str, Any], path: Path) -> dict[str, dict[str, Any]]:
    variants = content.get("variants") or {}
    if not isinstance(variants, dict):
        raise UsageError(f"{path}: `variants` must map names to sections")
    for name, body in variants.items():
        if not isinstance(body, dict):
            raise UsageError(f"{path}: variant {name} must be a mapping of sections")
    return {str(name): body for name, body in variants.items()}


def _varied(
    stages: Mapping[str, Any], variants: Mapping[str, Mapping[str, Any]], name: str, path: Path
) -> tuple[dict[str, Any], str]:
    """Sections and description of a variant; raises UsageError for one that is not there."""
    chain: list[str] = []
    while name is not None:
        if name not in variants:
            hint = nearest(name, variants) if variants else "it has no variants"
            raise UsageError(f"{path} has no variant {name}", hint)
        if name in chain:
            raise UsageError(f"{path}: variant {name} is like itself", " -> ".join([*chain, name]))
        chain.append(name)
        like = variants[name].get("like")
        name = None if like is None else str(like)
    sections = dict(stages)
    for link in reversed(chain):
        changes = {k: v for k, v in variants[link].items() if k not in VARIANT_KEYS}
        sections = _changed(sections, changes)
    return sections, str(variants[chain[0]].get("description", ""))


def _changed(sections: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Sections with single options replaced, null ones dropped, new ones behind the one before."""
    order = list(sections)
    merged = dict(sections)
    index = len(order)
    for key, body in changes.items():
        if key in order:
            index = order.index(key) + 1
        else:
            order.insert(index, key)
            index += 1
        both = isinstance(body, dict) and isinstance(merged.get(key), dict)
        merged[key] = {**merged[key], **body} if both else body
    dropped = {key for key, body in changes.items() if body is None}
    return {key: merged[key] for key in order if key not in dropped}


def substitute(value: Any, outputs: Mapping[str, str]) -> Any:
    """Replace `${section}` in a string, or in the strings of a list, by that section's output."""
    if isinstance(value, list):
        return [substitute(item, outputs) for item in value]
    if not isinstance(value, str):
        return value
    return REFERENCE.sub(lambda match: outputs[match[1]], value)


def resolved(recipe: Recipe) -> dict[str, dict[str, tuple[Any, str]]]:
    """Return for each section every key with its value and its origin, `recipe` or `default`."""
    whole = {}
    for section in recipe.sections:
        head = {"model": (section.model, "recipe")} if section.model else {}
        config = section.config.model_dump(mode="json")
        body = {k: (v, "recipe" if k in section.values else "default") for k, v in config.items()}
        whole[section.key] = head | body
    return whole


def schema() -> dict[str, Any]:
    """Return the JSON schema of recipe files."""
    text = {"type": "string"}
    sections = {}
    for name, command in stages().items():
        body = command.options.model_json_schema()
        body["properties"] |= dict.fromkeys(("model", "out", *command.model_keys), text)
        sections[f"^{name}(@[\\w.-]+)?$"] = body
    varied = {pattern: {"anyOf": [body, {"type": "null"}]} for pattern, body in sections.items()}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "mambactl recipe",
        "type": "object",
        "additionalProperties": False,
        "required": ["stages"],
        "properties": {
            "name": text,
            "description": text,
            "seed": {"type": "integer", "minimum": 0},
            "stages": {
                "type": "object",
                "additionalProperties": False,
                "minProperties": 1,
                "patternProperties": sections,
            },
            "variants": {
                "type": "object",
                "additionalProperties": {
                    "type": "object",
                    "additionalProperties": False,
                    "properties": dict.fromkeys(VARIANT_KEYS, text),
                    "patternProperties": varied,
                },
            },
        },
    }


def _find(spec: str) -> tuple[Path, str | None]:
    """The file and the variant that is asked for; a path may hold an @ of its own."""
    base, at, variant = spec.rpartition("@")
    for name, chosen in ((spec, None), (base, variant)) if at else ((spec, None),):
        path = Path(name).expanduser()
        for file in (path, recipe_folder() / f"{name}.yaml"):
            if name and file.is_file():
                return file.resolve(), chosen
    names = [path.stem for path in recipe_folder().glob("*.yaml")]
    raise UsageError(f"no recipe file or name {spec}", nearest(base or spec, names))


def _read(path: Path) -> dict[str, Any]:
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(content, dict):
        raise UsageError(f"{path} is not a recipe: it must be a mapping with `stages`")
    return content


def _section(key: str, body: Any, seed: dict[str, Any], path: Path) -> Section:
    stage = key.partition("@")[0]
    if stage not in (known := stages()):
        raise UsageError(f"{path}: {key} is not a stage", nearest(stage, known))
    if not isinstance(body, dict):
        raise UsageError(f"{path}: {key} must be a mapping of options")
    return _take(Section(key, stage, None, key.replace("@", "-"), dict(seed)), body, path)


def _take(section: Section, body: Mapping[str, Any], path: Path) -> Section:
    values = {str(key).replace("-", "_"): value for key, value in body.items()}
    models = [str(values.pop(key)) for key in section.command.model_keys if key in values]
    out = str(values.pop("out", section.out))
    for field in section.command.options.files:
        if field in values:
            values[field] = _located(values[field], path.parent)
    model = models[-1] if models else section.model
    section = replace(section, model=model, out=out, values={**section.values, **values})
    suffix = section.suffix or ""
    return section if out.endswith(suffix) else replace(section, out=out + suffix)


def _located(value: Any, folder: Path) -> Any:
    if isinstance(value, list):
        return [_located(item, folder) for item in value]
    if isinstance(value, str) and (folder / split_weight(value)[0]).is_file():
        return str(folder / value)
    return value


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
        by_key[owner] = _take(by_key[owner], {name[len(owner) + 1 :]: value}, path)
    return tuple(by_key.values())


def _check_references(sections: tuple[Section, ...], path: Path) -> None:
    written: list[str] = []
    for section in sections:
        for name in REFERENCE.findall(f"{section.model} {section.values}"):
            if name not in written:
                hint = f"checkpoints before it: {', '.join(written) or 'none'}"
                raise UsageError(f"{path}: {section.key} refers to ${{{name}}}", hint)
        if section.model is not None and not section.needs_model:
            raise UsageError(f"{path}: {section.key} works without a model", "drop its `model:`")
        if section.needs_model and section.model is None and not written:
            raise UsageError(f"{path}: {section.key} has no model", "give the first stage `model:`")
        if section.writes:
            written.append(section.key)
