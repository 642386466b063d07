"""Options that say the same thing in two ways: which of them counts."""

from collections.abc import Mapping

from mambactl import console
from mambactl.commands import COMMANDS
from mambactl.errors import UsageError


def settled(
    stage: str, recipe: Mapping[str, object], typed: Mapping[str, object]
) -> dict[str, object]:
    """The values of a recipe's section under those that a person typed.

    Where one option says more closely what another one says (`more_specific`), the closer one
    counts, wherever each is from, and a line says so. Raises UsageError where both were typed.
    """
    merged = {**recipe, **typed}
    for general, closer in COMMANDS[stage].options.more_specific.items():
        found = [name for name in closer if merged.get(name) is not None]
        if merged.get(general) is None or not found:
            continue
        flags = [f"--{name.replace('_', '-')}" for name in (general, found[0])]
        if general in typed and any(name in typed for name in found):
            raise UsageError(f"{' and '.join(flags)} exclude each other", "give one of them")
        where = "on the command line" if general in typed else "of the recipe"
        dropped = merged.pop(general)
        console.log(f"{stage}: {flags[1]} counts, not {flags[0]} {dropped} {where}")
    return merged
