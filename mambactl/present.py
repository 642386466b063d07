"""A value that may be None by its type and is not where the caller asks for it."""

from typing import TypeVar

T = TypeVar("T")


def present(value: T | None) -> T:
    """The value itself; TypeError for None, which is a fault of the program."""
    if value is None:
        raise TypeError("a value is missing that was made before")
    return value
