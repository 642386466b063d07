"""Safetensors checkpoints: a folder with one file or an index, and a single `.st`."""

import base64
import os
from collections.abc import Callable, Mapping
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self

from safetensors import SafetensorError, safe_open

from mambactl import console
from mambactl.bounds import HEADER_BYTES
from mambactl.checkpoint.lineage_record import checked_lineage
from mambactl.checkpoint.reader import NUMBER_TYPES, MappedReader, NumberType
from mambactl.checkpoint.side_files import (
    parse_config,
    read_config,
    read_folder_lineage,
    read_index,
    read_side_files,
    require_few,
)
from mambactl.errors import ModelError
from mambactl.files import BINARY_PREFIX, CONFIG, LINEAGE, is_side_file
from mambactl.foreign import AGAIN, blamed, reason, regular_size
from mambactl.json_values import JsonObject

if TYPE_CHECKING:
    import torch

_LENGTH_BYTES = 8


class TensorSlice(Protocol):
    """One tensor of a file, of which only the header has been read."""

    def get_shape(self) -> list[int]:
        """Shape of the tensor."""
        ...

    def get_dtype(self) -> str:
        """Number type of the tensor, by its name in the format."""
        ...

    def __getitem__(self, part: slice) -> Any:
        """A part of the tensor, read, as an array of the library that the file was opened for."""
        ...


class SafetensorsFile(Protocol):
    """An open safetensors file; tensors are numpy arrays or torch's, as it was opened."""

    def __enter__(self) -> Self: ...

    def __exit__(self, exc_type: object, exc_value: object, traceback: object, /) -> None: ...

    def keys(self) -> list[str]:
        """Names of all tensors."""
        ...

    def metadata(self) -> dict[str, str] | None:
        """Text fields of the header."""
        ...

    def get_slice(self, name: str) -> TensorSlice:
        """One tensor, not read yet."""
        ...

    def get_tensor(self, name: str) -> Any:
        """One tensor, read."""


# of a folder: all weights, or the names of the files that hold them
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")


class _SafetensorsReader(MappedReader):
    """Tensors in safetensors files, described by their headers."""

    def _map(self, file: Path) -> "Callable[[str], torch.Tensor]":
        return open_safetensors(file, "pt").get_tensor

    def _describe(self, files: list[Path]) -> None:
        for file in files:
            with open_safetensors(file) as handle:
                names = handle.keys()
                require_few(file, names)
                for name in names:
                    if name in self._where and self._where[name] != file:
                        continue
                    part = handle.get_slice(name)
                    self._described[name] = (
                        tuple(part.get_shape()),
                        _number_type(part, name, file),
                    )
        if lost := [name for name in self._where if name not in self._described]:
            raise ModelError(
                f"{self._where[lost[0]]} lacks {len(lost)} tensors that the index names, "
                f"first {lost[0]}",
                "fetch that file again",
            )
        if not self._described:
            raise ModelError(f"{files[0]} holds no tensors", AGAIN)


class FolderReader(_SafetensorsReader):
    """A Hugging Face folder with `model.safetensors` or a sharded set and its index."""

    def __init__(self, folder: Path):
        self.config = read_config(folder)
        single, index = (folder / name for name in WEIGHTS)
        if os.path.exists(single):
            # as transformers does: an index beside it is what an earlier save left
            where = {}
            if os.path.exists(index):
                _ignore(index)
        elif os.path.exists(index):
            where = read_index(index)
        else:
            raise ModelError(
                f"{folder} has safetensors files but neither model.safetensors nor its index",
                "fetch model.safetensors.index.json too",
            )
        super().__init__(folder, where)
        self._describe(sorted(set(where.values())) or [single])
        if not where:
            self._where = dict.fromkeys(self._described, single)
        self.lineage = read_folder_lineage(folder)

    @cached_property
    def files(  # pyright: ignore[reportIncompatibleVariableOverride]
        self,
    ) -> Mapping[str, str | bytes]:
        return read_side_files(self.path)


class SingleFileReader(_SafetensorsReader):
    """One `.st` file that carries everything in its metadata, or sits beside a config.json."""

    def __init__(self, file: Path):
        super().__init__(file, {})
        self._describe([file])
        self._where = dict.fromkeys(self._described, file)
        metadata = header_metadata(file)
        if CONFIG in metadata:
            self.config = parse_config(metadata[CONFIG], file)
            self.files = {
                name: _unpack(text, file, name)
                for name, text in metadata.items()
                if is_side_file(name)
            }
            self.lineage = _lineage(metadata, file)
            return
        if not os.path.exists(file.parent / CONFIG):
            raise ModelError(
                f"{file} carries no config and there is no {CONFIG} beside it",
                "give a file that mambactl wrote, or the whole folder",
            )
        self.config = read_config(file.parent)
        self.files = read_side_files(file.parent)
        self.lineage = read_folder_lineage(file.parent)


@cache
def _ignore(index: Path) -> None:
    """Warn once that an index is not read."""
    console.warn(f"{index} is ignored: model.safetensors beside it holds the weights")


def read_lineage(checkpoint: Path) -> JsonObject | None:
    """The mambactl.json of a folder, or in the header of a single file, if it has one."""
    if checkpoint.is_dir():
        return read_folder_lineage(checkpoint)
    return _lineage(header_metadata(checkpoint), checkpoint)


def open_safetensors(file: Path, framework: Literal["np", "pt"] = "np") -> SafetensorsFile:
    """An open file of safetensors with a bounded header; raises ModelError.

    Its tensors come as those of `framework`; names, shapes and types are the same in both.
    """
    try:
        size = regular_size(file)
    except ModelError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise ModelError(f"{file} is missing", "fetch the checkpoint again") from error
        raise
    with blamed(file, hint=AGAIN):
        with file.open("rb") as content:
            header = int.from_bytes(content.read(_LENGTH_BYTES), "little")
        if size < _LENGTH_BYTES or header > size - _LENGTH_BYTES:
            raise ModelError(f"{file} is truncated or not a safetensors file", AGAIN)
        if header > HEADER_BYTES.most:
            raise ModelError(
                f"{file} has a header of {header:,} bytes, {HEADER_BYTES} are the most", AGAIN
            )
        try:
            return safe_open(file, framework=framework)
        except SafetensorError as error:
            message = f"{file} is truncated or not a safetensors file ({reason(error)})"
            raise ModelError(message, AGAIN) from error


def header_metadata(file: Path) -> dict[str, str]:
    """The texts in the header of a safetensors file; raises ModelError."""
    with open_safetensors(file) as handle:
        return handle.metadata() or {}


def _lineage(metadata: Mapping[str, str], file: Path) -> JsonObject | None:
    return checked_lineage(metadata[LINEAGE], file) if LINEAGE in metadata else None


def _number_type(part: TensorSlice, name: str, file: Path) -> NumberType:
    stored = part.get_dtype()
    if stored not in NUMBER_TYPES:
        raise ModelError(f"{file}: {name} is stored as {stored}", "give an unquantised checkpoint")
    return NUMBER_TYPES[stored]


def _unpack(text: str, file: Path, name: str) -> str | bytes:
    if not text.startswith(BINARY_PREFIX):
        return text
    with blamed(file, name):
        return base64.b64decode(text.removeprefix(BINARY_PREFIX), validate=True)
