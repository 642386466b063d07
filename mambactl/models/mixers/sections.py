"""Sections of a configuration: the settings of mixers as JSON, and what is no such section."""

from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields, is_dataclass
from typing import get_args, get_type_hints

from mambactl.bounds import WIDTH


def section_values(settings: object) -> dict[str, object]:
    """A section of the configuration as JSON-able values, from them or from a dataclass."""
    if is_dataclass(settings) and not isinstance(settings, type):
        return asdict(settings)
    if isinstance(settings, Mapping):
        return dict(settings)
    raise TypeError(f"{type(settings).__name__} is no section of a configuration")


def check_section(kind: type, values: object) -> None:
    """Raise ValueError unless `values` are those of the dataclass `kind`, each in its range."""
    if not isinstance(values, Mapping):
        raise ValueError(f"is {type(values).__name__}, not an object")
    hints = get_type_hints(kind)
    if unknown := sorted(values.keys() - hints.keys()):
        raise ValueError(f"has the unknown key {unknown[0]!r}")
    for each in fields(kind):
        if each.name in values:
            _check_value(each.name, values[each.name], hints[each.name])
        elif each.default is MISSING:
            raise ValueError(f"has no {each.name}")


def _check_value(name: str, value: object, hint: type) -> None:
    kinds = get_args(hint) or (hint,)
    number = float in kinds and type(value) is int
    if not number and type(value) not in kinds:
        expected = " or ".join(kind.__name__ for kind in kinds)
        raise ValueError(f"has {name} of type {type(value).__name__}, not {expected}")
    if isinstance(value, int | float) and not 0 <= value <= WIDTH.most:
        raise ValueError(f"has {name} {value}, not one from 0 to {WIDTH.most}")


def check_sizes(settings: object, *ratios: tuple[str, str]) -> None:
    """Raise ValueError unless both of each pair are positive and the second divides the first."""
    for whole, part in ratios:
        one, other = getattr(settings, whole), getattr(settings, part)
        if not (one and other) or one % other:
            raise ValueError(f"{whole} {one} is no multiple of {part} {other}")
