"""Paths that a file may name: they stay inside the folder of what is written."""

import os
import re
from pathlib import Path, PurePosixPath

from mambactl.errors import UsageError
from mambactl.foreign import excerpt

# one name of a path, with no character that a shell, a pattern or a URL would read
_NAME = re.compile(r"(?!-)(?!\.+$)[\w@+=,. -]{1,200}")


def is_name(text: str) -> bool:
    """True if text is the plain name of one file: no folder, no leading hyphen, not `..`."""
    return _NAME.fullmatch(text) is not None


def require_inner(text: str, what: str) -> None:
    """Raise UsageError unless `text` is a relative path of plain names; `what` says whose it is."""
    if not all(map(is_name, text.split("/"))):
        raise UsageError(
            f"{what} is {excerpt(text)!r}, which may lead out of the working folder",
            "give a plain name: letters, digits, - _ . and / between folders",
        )


def require_inside(path: Path, folder: Path) -> None:
    """Raise UsageError where links lead from a path inside `folder` to a place outside of it."""
    real = os.path.realpath(path)
    if not PurePosixPath(real).is_relative_to(os.path.realpath(folder)):
        raise UsageError(
            f"{path} leads out of {folder}, to {real}", "remove the link, or choose another --out"
        )
