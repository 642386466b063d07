"""Data sets that `datasets` reads: on the hub, cloned from it, and folders of `save_to_disk`."""

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, cast

from mambactl.checkpoint.hub_refusals import accept_terms, log_in, url_of
from mambactl.checkpoint.resolve import hub_forbidden
from mambactl.data.row_containers import SUFFIXES, without_nulls
from mambactl.data.turns import Row
from mambactl.errors import UsageError
from mambactl.files import CONFIG
from mambactl.foreign import blamed, reason

if TYPE_CHECKING:
    from datasets import Dataset

TRAIN = "train"
# what save_to_disk writes: of one set, and of several splits
_SAVED, _SAVED_SPLITS = "state.json", "dataset_dict.json"
_HUB_ID = re.compile(r"^(?P<id>[\w.-]+(?:/[\w.-]+)?)(?::(?P<config>[^@/]+))?(?:@(?P<split>.+))?$")


class Folder(NamedTuple):
    """A folder with a data set, and which part of it is meant."""

    path: str
    config: str | None = None
    split: str | None = None


def folder_of(spec: str) -> Folder | None:
    """The folder that `PATH[:config][@split]` names; None where there is none of that name."""
    if os.path.isdir(spec):
        return Folder(spec)
    path, at, split = spec.rpartition("@")
    path = path if at else spec
    if at and os.path.isdir(path):
        return Folder(path, None, split)
    path, colon, config = path.rpartition(":")
    if colon and os.path.isdir(path):
        return Folder(path, config, split if at else None)
    return None


def require_set(folder: Folder) -> None:
    """Raise UsageError for a folder that holds no data set, as its names say."""
    path = Path(folder.path)
    hint = f"give a folder of save_to_disk, one cloned from the hub, or '{path}/*.jsonl'"
    if (path / CONFIG).exists():
        raise UsageError(f"{path} is a folder with a checkpoint, not with data", hint)
    with blamed(path, kind=UsageError, hint=hint):
        there = any(name.endswith((*SUFFIXES, ".arrow")) for name in _names(path))
    if not there:
        raise UsageError(f"{path} is a folder without rows", hint)


def _names(path: Path) -> Iterator[str]:
    for _, _, names in os.walk(path, followlinks=True):
        yield from names


def read_folder(folder: Folder) -> Iterator[tuple[int, object]]:
    """Rows of a folder, each with its number; raises UsageError for a folder without a set."""
    path = _snapshot(Path(folder.path))
    if (path / _SAVED).exists() or (path / _SAVED_SPLITS).exists():
        rows: Iterable[Row] = _saved(path, folder)
    else:
        rows = _cloned(path, folder)
    yield from enumerate(map(without_nulls, rows), start=1)


def _snapshot(path: Path) -> Path:
    """The newest state of a set in the hub's own cache; any other folder is itself."""
    head = path / "refs" / "main"
    if not head.is_file():
        return path
    newest = path / "snapshots" / head.read_text("utf-8").strip()
    return newest if newest.is_dir() else path


def _saved(path: Path, folder: Folder) -> Iterable[Row]:
    """A set of save_to_disk: all of it, or `split` with slices as on the hub."""
    from datasets import DatasetDict, concatenate_datasets, load_from_disk

    try:
        found = load_from_disk(str(path))
    except Exception as error:  # whatever damaged files bring
        message = f"{path} cannot be read as a saved data set: {reason(error)}"
        raise UsageError(message, "save it again") from None
    if isinstance(found, DatasetDict):
        splits = {str(name): rows for name, rows in found.items()}
        return _rows_of(concatenate_datasets(_parts(splits, folder, folder.split or TRAIN)))
    if folder.split is None:
        return _rows_of(found)
    name = str(found.split or TRAIN)
    return _rows_of(concatenate_datasets(_parts({name: found}, folder, folder.split)))


def _rows_of(found: "Dataset") -> Iterable[Row]:
    # the library has no annotation for what an iterator yields
    return cast(Iterable[Row], found)


def _parts(splits: "dict[str, Dataset]", folder: Folder, asked: str) -> "list[Dataset]":
    from datasets import ReadInstruction

    sizes = {name: len(rows) for name, rows in splits.items()}
    try:
        wanted = ReadInstruction.from_spec(asked).to_absolute(sizes)
    except (ValueError, AssertionError):
        known = ", ".join(f"{folder.path}@{name}" for name in sizes)
        raise UsageError(f"{folder.path} has no split {asked}", f"give {known}") from None
    return [splits[one.splitname].select(range(one.from_, one.to)) for one in wanted]


def _cloned(path: Path, folder: Folder) -> Iterator[Row]:
    """A folder laid out as on the hub: a card, files named after splits, or folders of them."""
    from datasets import load_dataset

    split = folder.split or TRAIN
    try:
        # of a split it is rows, not several sets by name
        rows = load_dataset(str(path), folder.config, split=split, streaming="[" not in split)
        yield from cast(Iterable[Row], rows)
    except Exception as error:  # whatever the library and the files bring
        hint = "give FOLDER@split of a data set, or 'FOLDER/*.jsonl'"
        raise UsageError(f"{folder.path} is a folder without rows: {reason(error)}", hint) from None


def hub_parts(spec: str) -> re.Match[str]:
    """Id, config and split of a data set on the hub; raises UsageError for another text."""
    match = _HUB_ID.match(spec)
    if match is None:
        raise UsageError(f"{spec} is no file and no hub id", "use ID[:config][@split] or a file")
    return match


def read_hub(spec: str) -> Iterator[tuple[int, object]]:
    """Rows of a set on the hub, each with its number."""
    match = hub_parts(spec)
    split = match["split"] or TRAIN
    try:
        from datasets import load_dataset

        rows = load_dataset(match["id"], match["config"], split=split, streaming="[" not in split)
        yield from enumerate(map(without_nulls, cast(Iterable[Row], rows)), start=1)
    except Exception as error:  # whatever the network, the library and the files bring
        message = f"data set {spec} cannot be loaded: {reason(error)}"
        raise UsageError(message, _hub_hint(match["id"], error)) from None


def _hub_hint(name: str, error: Exception) -> str:
    """Hint for a data set of the hub that cannot be loaded."""
    if hub_forbidden():
        return "unset HF_HUB_OFFLINE, or give a local file"
    if "gated" in str(error):
        return accept_terms(url_of(f"datasets/{name}"))
    if type(error).__name__ == "DatasetNotFoundError":
        return f"check the id; for a private one {log_in('read')}"
    return "check the id, `:config`, `@split` and the network, or give a local file"
