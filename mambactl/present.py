"""Checked narrowing of values to what the caller knows of them: not None, or of a class."""

from typing import TypeVar

T = TypeVar("T")


def present(value: T | None) -> T:
    """The value itself; TypeError for None, which is a fault of the program."""
    if value is None:
        raise TypeError("a value is missing that was made before")
    return value


def of_kind(kind: type[T], value: object) -> T:
    """The value, which is of a class that the caller knows; TypeError for another."""
    if not isinstance(value, kind):
        raise TypeError(f"a {kind.__name__} is needed, not a {type(value).__name__}")
    return value
