"""Variants of a recipe: relatives that are kept in its file as changes of its sections."""

from collections.abc import Mapping
from pathlib import Path

from mambactl.containment import is_name
from mambactl.errors import UsageError
from mambactl.foreign import excerpt
from mambactl.options.fields import nearest

VARIANT_KEYS = ("like", "description")


def variants_of(content: Mapping[str, object], path: Path) -> dict[str, dict[str, object]]:
    """The variants of a recipe by name; raises UsageError for what is none."""
    variants = content.get("variants") or {}
    if not isinstance(variants, dict):
        raise UsageError(f"{path}: `variants` must map names to sections")
    for name, body in variants.items():
        if not isinstance(body, dict):
            raise UsageError(f"{path}: variant {excerpt(name)} must be a mapping of sections")
        if not is_name(name):
            raise UsageError(
                f"{path}: variant {excerpt(name)!r} has no plain name",
                "use letters, digits, - _ and .",
            )
    return variants


def varied(
    stages: Mapping[str, object],
    variants: Mapping[str, Mapping[str, object]],
    name: str,
    path: Path,
) -> tuple[dict[str, object], str]:
    """Sections and description of a variant; raises UsageError for one that is not there."""
    chain: list[str] = []
    wanted: str | None = name
    while wanted is not None:
        name = wanted
        if name not in variants:
            hint = nearest(name, variants) if variants else "it has no variants"
            raise UsageError(f"{path} has no variant {excerpt(name)}", hint)
        if name in chain:
            raise UsageError(f"{path}: variant {name} is like itself", " -> ".join([*chain, name]))
        chain.append(name)
        like = variants[name].get("like")
        wanted = None if like is None else str(like)
    sections = dict(stages)
    for link in reversed(chain):
        changes = {k: v for k, v in variants[link].items() if k not in VARIANT_KEYS}
        sections = _changed(sections, changes)
    return sections, text_of(variants[chain[0]], "description", "", path)


def _changed(sections: Mapping[str, object], changes: Mapping[str, object]) -> dict[str, object]:
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
        before = merged.get(key)
        if isinstance(body, dict) and isinstance(before, dict):
            body = {**before, **body}
        merged[key] = body
    dropped = {key for key, body in changes.items() if body is None}
    return {key: merged[key] for key in order if key not in dropped}


def text_of(content: Mapping[str, object], key: str, default: str, path: Path) -> str:
    """A key of a recipe that holds text; raises UsageError for another value."""
    value = content.get(key, default)
    if not isinstance(value, str | int | float):
        raise UsageError(f"{path}: `{key}` must be text")
    return str(value)
