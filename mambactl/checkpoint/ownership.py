"""Checks before an output is replaced: mambactl wrote it, and the command does not read it.

Links are never followed. A folder is ours when its mambactl.json is, a single file when its header
says so, a file of rows when its lineage lies beside it.
"""

import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path

from mambactl.errors import MambactlError, ModelError, OutputError
from mambactl.files import (
    CARD,
    CONFIG,
    LEDGER,
    LINEAGE,
    NAMED_TEMPLATES,
    PLOT,
    RESULTS,
    SIDE_FILES,
    SINGLE_FILE_SUFFIXES,
    explained,
    partial_of,
)
from mambactl.foreign import blamed, json_object, read_object, read_text
from mambactl.json_values import JsonObject
from mambactl.options import StageConfig
from mambactl.options.fields import split_weight
from mambactl.registration import STUB

# what a checkpoint folder or a teacher cache is made of
WRITTEN = (
    *(CONFIG, LINEAGE, CARD, LEDGER, PLOT, STUB, *SIDE_FILES),
    *("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json"),
    "samples-*.safetensors",
    # of other programs' forms
    *("pytorch_model.bin", "mamba_config.json"),
)
_ELSEWHERE = "choose another place with -o"
_SHOWN = 3


def require_replaceable(out: Path, force: bool, side: Iterable[str] = ()) -> None:
    """Raise OutputError when something at `out` may not be replaced.

    `side` names what will be written beside a single file, where nobody else's may lie either.
    """
    with explained(out, "free some space"):
        status = _status(out)
        if status is None:
            _require_free_sides(out, side)
            return
        if stat.S_ISLNK(status.st_mode):
            raise OutputError(f"{out} is a symbolic link, which -o does not follow", _ELSEWHERE)
        if not force:
            raise OutputError(f"{out} exists already", "add --force to replace it, or another -o")
        if stat.S_ISDIR(status.st_mode):
            _require_own_folder(out)
        elif not stat.S_ISREG(status.st_mode):
            raise OutputError(f"{out} is a pipe or device", _ELSEWHERE)
        elif status.st_size and not _is_own_file(out):
            raise OutputError(
                f"{out} was not written by mambactl, or is damaged",
                "choose another place with -o, or remove it yourself",
            )


def own_lineage(path: Path) -> JsonObject | None:
    """The lineage in a file that we wrote; None for any other file."""
    if path.is_symlink() or not path.is_file():
        return None
    try:
        found = read_object(path)
    except ModelError:
        return None
    return found if "stage" in found else None


def located(out: Path) -> Path:
    """The absolute path that -o means; raises OutputError for one that cannot be a name."""
    path = Path(os.path.abspath(out))
    # stdout is one line, which the next stage reads
    if not path.name or any(end in str(path) for end in "\0\r\n"):
        raise OutputError(f"{path} cannot be written", "give -o the name of a checkpoint")
    return path


def require_apart(out: Path, inputs: Iterable[tuple[str, str]]) -> None:
    """Raise OutputError where an input, given by option and text, lies in what is replaced.

    That is `out`, its working folder, and what is written beside it.
    """
    replaced = _replaced(located(out))
    taken = {path: status for path in replaced if (status := _target(path)) is not None}
    if not taken:
        return
    for option, text in inputs:
        given = Path(os.path.realpath(os.path.expanduser(text)))
        for path in (given, *given.parents):
            status = _target(path)
            owner = next(
                (one for one, other in taken.items() if _same(status, other)),
                None,
            )
            if owner is not None:
                what = f"is {owner}" if path == given else f"lies inside {owner}"
                raise OutputError(
                    f"{option} {text} {what}, which this command would replace", _ELSEWHERE
                )


def inputs_of(config: StageConfig) -> Iterator[tuple[str, str]]:
    """Every file, folder or model that options name, with the option."""
    for name in sorted(config.inputs & type(config).model_fields.keys()):
        value = getattr(config, name)
        for text in [value] if isinstance(value, str) else value or ():
            yield f"--{name.replace('_', '-')}", split_weight(text)[0]


def _replaced(out: Path) -> Iterator[Path]:
    yield out
    yield partial_of(out)
    if not out.is_dir():
        yield from (out.with_name(f"{out.name}.{name}") for name in (LEDGER, PLOT, LINEAGE))


def _target(path: Path) -> os.stat_result | None:
    """Return the status of what a path resolves to, or None if that cannot be read."""
    try:
        return os.stat(path)
    except (OSError, ValueError):
        return None


def _same(one: os.stat_result | None, other: os.stat_result) -> bool:
    return one is not None and os.path.samestat(one, other)


def _status(path: Path) -> os.stat_result | None:
    try:
        return os.lstat(path)
    except FileNotFoundError:
        return None


def _require_own_folder(out: Path) -> None:
    entries = sorted(os.scandir(out), key=lambda entry: entry.name)
    if not entries:
        return
    if own_lineage(out / LINEAGE) is None:
        raise OutputError(
            f"{out} is a folder with other content: it has no {LINEAGE} of ours",
            "choose another place with -o, or remove it yourself",
        )
    foreign = [entry.name for entry in entries if not _is_written(entry)]
    if foreign:
        more = f" and {len(foreign) - _SHOWN} more" if len(foreign) > _SHOWN else ""
        raise OutputError(
            f"{out} holds {', '.join(foreign[:_SHOWN])}{more}, which mambactl did not write",
            "move it elsewhere, or choose another place with -o",
        )


def _is_written(entry: os.DirEntry[str]) -> bool:
    if entry.is_dir(follow_symlinks=False):
        return entry.name in (RESULTS, NAMED_TEMPLATES)
    known = any(fnmatch(entry.name, pattern) for pattern in WRITTEN)
    return known and entry.is_file(follow_symlinks=False)


def _is_own_file(path: Path) -> bool:
    if path.suffix in SINGLE_FILE_SUFFIXES:
        return "mambactl" in _metadata(path)
    return own_lineage(path.with_name(f"{path.name}.{LINEAGE}")) is not None


def _metadata(path: Path) -> Mapping[str, str]:
    from safetensors import safe_open

    try:
        with blamed(path), safe_open(path, "np") as content:
            return content.metadata() or {}
    except MambactlError:
        return {}


def _require_free_sides(out: Path, side: Iterable[str]) -> None:
    """Raise OutputError where a file beside a new single file is somebody else's."""
    for name in side:
        path = out.with_name(f"{out.name}.{name}")
        if _status(path) is not None and not _is_own_side(out, path, name):
            raise OutputError(
                f"{path} exists and was not written by mambactl",
                "move it elsewhere, or choose another place with -o",
            )


def _is_own_side(out: Path, path: Path, name: str) -> bool:
    if path.is_symlink() or not path.is_file():
        return False
    if name == LINEAGE:
        return own_lineage(path) is not None
    ledger = out.with_name(f"{out.name}.{LEDGER}")
    return _is_ledger(ledger) and path.is_file()


def _is_ledger(path: Path) -> bool:
    """Return whether the file is a ledger, judged by its first line."""
    try:
        first = read_text(path).partition("\n")[0]
        return "phase" in json_object(first, path)
    except ModelError:
        return False
