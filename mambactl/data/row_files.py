"""Data sets by the names that options give them: files, patterns, folders and ids of the hub."""

import glob
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from mambactl.data.bad_rows import BadRows
from mambactl.data.row_containers import SUFFIXES, rows_of
from mambactl.data.row_folders import folder_of, read_folder, read_hub, require_set
from mambactl.errors import UsageError
from mambactl.foreign import blamed

_KNOWN = f"give a file ending in {', '.join(SUFFIXES)}"


class Found(NamedTuple):
    """A row as it lies somewhere: `where` names file and row, `file` is what holds it."""

    where: str
    row: object
    file: str


def is_on_hub(spec: str) -> bool:
    """True if a name means a data set on the hub: no known kind of file, and none that exists."""
    if spec.endswith(SUFFIXES) or os.path.exists(spec) or folder_of(spec) is not None:
        return False
    return not _matches(spec)


def read_rows(spec: str, bad: BadRows | None = None) -> Iterator[Found]:
    """Rows of one data set as they are: of a file, the files of a pattern, a folder or the hub.

    Lines that are no JSON are noted in `bad`, if there is one.
    """
    require_there(spec)
    if is_on_hub(spec):
        yield from (Found(f"{spec}, row {n}", row, spec) for n, row in read_hub(spec))
        return
    if (folder := folder_of(spec)) is not None:
        yield from (Found(f"{spec}, row {n}", row, spec) for n, row in read_folder(folder))
        return
    for file in files_of(spec):
        yield from (Found(f"{file}, row {n}", row, file) for n, row in rows_of(file, bad))


def files_of(spec: str) -> list[str]:
    """The files that a local name means, in order; all those of a folder."""
    if os.path.lexists(spec) and not os.path.isdir(spec):
        return [spec]
    if (folder := folder_of(spec)) is not None:
        return sorted(str(path) for path in Path(folder.path).rglob("*") if path.is_file())
    return _matches(spec) or [spec]


def _matches(spec: str) -> list[str]:
    """Files that a pattern means, in the order of their names."""
    if not glob.has_magic(spec) or "\0" in spec:
        return []
    return sorted(path for path in glob.glob(spec, recursive=True) if not os.path.isdir(path))


def require_there(spec: str) -> None:
    """Raise UsageError for a file that is missing or of no known kind; no hub is asked."""
    if is_on_hub(spec):
        return
    if (folder := folder_of(spec)) is not None:
        require_set(folder)
        return
    for file in files_of(spec):
        with blamed(file, kind=UsageError, hint=_KNOWN):
            if not _is_there(file):
                what = "matches no file" if glob.has_magic(spec) else "does not exist"
                raise UsageError(f"{spec} {what}", f"{_KNOWN}, or a hub id")
        if not file.endswith(SUFFIXES):
            raise UsageError(f"{file}: unknown kind of file", f"known are {', '.join(SUFFIXES)}")


def require_prompts(path: str) -> str:
    """The local data set that an option for prompts names; raises UsageError without one."""
    spec = os.path.expanduser(path)
    known = os.path.exists(spec) or folder_of(spec) is not None or _matches(spec)
    if "\0" in spec or not known:
        raise UsageError(f"{path} is no file", hint="give a .txt or .jsonl file with prompts")
    require_there(spec)
    return spec


def _is_there(path: str) -> bool:
    try:
        os.stat(path)
    except FileNotFoundError:
        return False
    return True
