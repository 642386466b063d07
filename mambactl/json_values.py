"""Types of JSON."""

from collections.abc import Mapping
from typing import Any, TypeAlias

Json: TypeAlias = "dict[str, Json] | list[Json] | str | int | float | bool | None"
# of a file that others write, or of an open set of members: what one is, is asked where it is read
JsonObject: TypeAlias = dict[str, Any]
AnyObject: TypeAlias = Mapping[str, Any]
