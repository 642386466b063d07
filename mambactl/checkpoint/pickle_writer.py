"""Write a folder with `pytorch_model.bin` as a stream of tensors.

The file is a zip archive with one member for each storage and `data.pkl`, which says how tensors
are rebuilt from them; torch's own writer needs every tensor at once.
"""

import io
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch._utils import _rebuild_tensor_v2

from mambactl.checkpoint.container import (
    Shape,
    json_text,
    memory_of,
    nbytes,
    require_planned,
    require_room,
    write_side_files,
)
from mambactl.files import CONFIG, remove, sync_folder
from mambactl.present import present

WEIGHTS = "pytorch_model.bin"
# folder of all members, and the version of the layout of the archive
_ROOT, _VERSION = "pytorch_model", "3\n"
# torch maps storages of such offsets into memory
_ALIGNMENT = 64
# of a local header without its name; of the field of 64-bit sizes; of the head of an extra field
_HEADER_BYTES, _SIZES_BYTES, _EXTRA_BYTES = 30, 20, 4
_STORAGES = {
    torch.float64: torch.DoubleStorage,
    torch.float32: torch.FloatStorage,
    torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage,
}


@dataclass(frozen=True)
class _Planned:
    """A tensor of the pickle, by the storage that holds it."""

    key: str
    shape: Shape
    dtype: torch.dtype


@dataclass(frozen=True)
class _Storage:
    key: str
    dtype: torch.dtype
    elements: int


class _Pickler(pickle.Pickler):
    """Pickles planned tensors as torch pickles tensors."""

    def reducer_override(self, value: object) -> Any:
        if not isinstance(value, _Planned):
            return NotImplemented
        size = torch.Size(value.shape)
        storage = _Storage(value.key, value.dtype, size.numel())
        strides = torch.empty(size, device="meta").stride()
        arguments = (storage, 0, tuple(size), strides, False, OrderedDict())
        return _rebuild_tensor_v2, arguments

    def persistent_id(self, value: object) -> object:
        if not isinstance(value, _Storage):
            return None
        return "storage", _STORAGES[value.dtype], value.key, "cpu", value.elements


class PickleFolder:
    """A folder with `pytorch_model.bin`, a configuration and other texts, being written.

    `aliases` maps further names to those of planned tensors, whose storage they share.
    """

    def __init__(
        self,
        path: Path,
        config: Mapping[str, object],
        side_files: Mapping[str, str | bytes],
        lineage: Mapping[str, object] | None,
        aliases: Mapping[str, str],
    ):
        self.path, self.config, self.side_files = path, config, dict(side_files)
        self.lineage, self.aliases = lineage, aliases
        self._planned: dict[str, _Planned] = {}
        self._pending: set[str] = set()
        self._archive: zipfile.ZipFile | None = None

    def plan(self, tensors: Mapping[str, tuple[Shape, torch.dtype]]) -> None:
        """Declare every tensor; must come before the first write."""
        require_room(self.path.parent, sum(nbytes(*each) for each in tensors.values()))
        remove(self.path)
        self.path.mkdir()
        self._planned = {
            name: _Planned(str(number), *described)
            for number, (name, described) in enumerate(tensors.items())
        }
        self._pending = set(tensors)
        every = self._planned | {new: self._planned[old] for new, old in self.aliases.items()}
        pickled = io.BytesIO()
        _Pickler(pickled, protocol=2).dump(OrderedDict(every))
        self._archive = zipfile.ZipFile(self.path / WEIGHTS, "x", allowZip64=True)
        self._add("data.pkl", pickled.getbuffer())
        self._add("byteorder", memoryview(b"little"))
        self._add("version", memoryview(_VERSION.encode()))

    def write(self, name: str, *parts: torch.Tensor) -> None:
        """Store one planned tensor or its parts; raises ValueError when it is not as planned."""
        planned = self._planned[name]
        require_planned(name, parts, (planned.shape, planned.dtype))
        self._add(f"data/{planned.key}", *map(memory_of, parts))
        self._pending.discard(name)

    def close(self) -> None:
        """Flush everything to the disk; raises ValueError where a planned tensor is missing."""
        if self._pending or self._archive is None:
            raise ValueError(f"{len(self._pending)} planned tensors were never written")
        self.release()
        with (self.path / WEIGHTS).open("rb") as written:
            os.fsync(written.fileno())
        texts = {CONFIG: json_text(self.config), **self.side_files}
        write_side_files(self.path, texts, self.lineage)
        sync_folder(self.path)

    def release(self) -> None:
        """Close the archive."""
        if self._archive is not None:
            self._archive.close()
        self._archive = None

    def _add(self, name: str, *contents: memoryview) -> None:
        archive = present(self._archive)
        member = zipfile.ZipInfo(f"{_ROOT}/{name}")
        begins = present(archive.fp).tell() + _HEADER_BYTES + len(member.filename) + _SIZES_BYTES
        missing = -(begins + _EXTRA_BYTES) % _ALIGNMENT
        member.extra = b"FB" + struct.pack("<H", missing) + b"Z" * missing
        with archive.open(member, "w", force_zip64=True) as file:
            for content in contents:
                file.write(content)
