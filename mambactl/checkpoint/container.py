"""The safetensors container of a checkpoint, written as a stream of tensors.

The format is an 8 byte length, a JSON header and raw tensors; its own library needs every tensor
at once, which a 16 GB model on a laptop does not allow.
"""

import base64
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from transformers import PretrainedConfig

from mambactl.checkpoint.card import model_card
from mambactl.checkpoint.reader import NUMBER_TYPES
from mambactl.console import failure_warned
from mambactl.errors import ResourceError
from mambactl.files import BINARY_PREFIX, CARD, CONFIG, LINEAGE, gib, remove, sync_folder
from mambactl.json_values import AnyObject, JsonObject
from mambactl.registration import STUB, STUB_TEXT

DEFAULT_SHARD_BYTES = 5_000_000_000
# a single file's header comes first, but its lineage may hold what writing the tensors found out
LATE_LINEAGE_BYTES = 1 << 17

_CODES = {getattr(torch, kind.name): code for code, kind in NUMBER_TYPES.items()}
OTHER_DISK = "free some space or choose another disk with -o"

Shape = tuple[int, ...]


class TensorFile(Protocol):
    """A file or folder of tensors, which are planned and then written in any order."""

    # may be set until `close`
    lineage: AnyObject | None

    def plan(self, tensors: Mapping[str, tuple[Shape, torch.dtype]]) -> None:
        """Declare every tensor; must come before the first write."""

    def write(self, name: str, *parts: torch.Tensor) -> None:
        """Store one planned tensor, whole or in parts that lie one behind the other.

        Raises ValueError when it is not as planned.
        """

    def close(self) -> None:
        """Flush everything to the disk; raises ValueError where a planned tensor is missing."""

    def release(self) -> None:
        """Close open files."""


@dataclass
class _Shard:
    """One safetensors file being filled; `start` maps names to byte offsets in it."""

    path: Path
    fd: int
    start: dict[str, int]
    layout: dict[str, tuple[Shape, torch.dtype]] = field(default_factory=dict)
    head_bytes: int = 0


class Container:
    """A checkpoint being written at `path`: one file that carries everything, or a folder.

    Tensors are planned, then written in any order. `lineage` may be set until `close`.
    """

    def __init__(
        self,
        path: Path,
        single: bool,
        config: PretrainedConfig | AnyObject,
        side_files: Mapping[str, str | bytes],
        lineage: AnyObject | None,
        max_shard_bytes: float = DEFAULT_SHARD_BYTES,
    ):
        self.path, self.single = path, single
        self.config, self.side_files, self.lineage = config, dict(side_files), lineage
        self.max_shard_bytes = max_shard_bytes
        self._shards: list[_Shard] = []
        self._home: dict[str, _Shard] = {}
        self._pending: set[str] = set()

    def plan(self, tensors: Mapping[str, tuple[Shape, torch.dtype]]) -> None:
        """Declare every tensor; must come before the first write."""
        require_room(self.path.parent, sum(nbytes(*each) for each in tensors.values()))
        remove(self.path)
        if not self.single:
            self.path.mkdir()
        groups = [dict(tensors)] if self.single else self._split(tensors)
        for number, group in enumerate(groups, 1):
            self._open_shard(self._shard_path(number, len(groups)), group)
        self._pending = set(tensors)

    def write(self, name: str, *parts: torch.Tensor) -> None:
        """Store one planned tensor or its parts; raises ValueError when it is not as planned."""
        shard = self._home[name]
        require_planned(name, parts, shard.layout[name])
        start = shard.start[name]
        for part in parts:
            write_at(shard.fd, memory_of(part), start)
            start += part.nbytes
        self._pending.discard(name)

    def close(self) -> None:
        """Flush everything to the disk; raises ValueError where a planned tensor is missing."""
        if self._pending or not self._shards:
            raise ValueError(f"{len(self._pending)} planned tensors were never written")
        if self.single:
            self._rewrite_header(self._shards[0])
        for shard in self._shards:
            os.fsync(shard.fd)
        if not self.single:
            self._write_side_files()
            sync_folder(self.path)
        self.release()

    def release(self) -> None:
        """Close open files."""
        for shard in self._shards:
            os.close(shard.fd)
        self._shards = []

    def _split(self, tensors: Mapping[str, tuple[Shape, torch.dtype]]) -> list[dict]:
        groups: list[dict] = [{}]
        filled = 0
        for name, described in tensors.items():
            size = nbytes(*described)
            if groups[-1] and filled + size > self.max_shard_bytes:
                groups.append({})
                filled = 0
            groups[-1][name] = described
            filled += size
        return groups

    def _shard_path(self, number: int, count: int) -> Path:
        if self.single:
            return self.path
        if count == 1:
            return self.path / "model.safetensors"
        return self.path / f"model-{number:05d}-of-{count:05d}.safetensors"

    def _open_shard(self, path: Path, layout: dict[str, tuple[Shape, torch.dtype]]) -> None:
        head, start = _header(layout, self._metadata(), LATE_LINEAGE_BYTES if self.single else 0)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        shard = _Shard(path, fd, start, layout, len(head))
        self._shards.append(shard)
        self._home.update(dict.fromkeys(layout, shard))
        write_at(fd, memoryview(head), 0)

    def _rewrite_header(self, shard: _Shard) -> None:
        """Put the final lineage into the room that was left for it."""
        head, _ = _header(shard.layout, self._metadata(), 0)
        room = shard.head_bytes - len(head)
        if room < 0:
            raise ValueError(f"the lineage is {-room} bytes longer than the header has room for")
        head, _ = _header(shard.layout, self._metadata(), room)
        write_at(shard.fd, memoryview(head), 0)

    def _metadata(self) -> dict[str, str]:
        metadata = {"format": "pt"}
        if not self.single:
            return metadata
        metadata |= {"mambactl": "1", CONFIG: _config_text(self.config)}
        for name, content in self.side_files.items():
            if isinstance(content, bytes):
                # a sentencepiece model repeats what tokenizer.json says
                if "tokenizer.json" in self.side_files:
                    continue
                content = BINARY_PREFIX + base64.b64encode(content).decode("ascii")
            metadata[name] = content
        if self.lineage is not None:
            metadata[LINEAGE] = json_text(self.lineage)
        return metadata

    def _write_side_files(self) -> None:
        texts: dict[str, str | bytes] = {CONFIG: _config_text(self.config), **self.side_files}
        texts[STUB] = STUB_TEXT
        if len(self._shards) > 1:
            texts["model.safetensors.index.json"] = self._index()
        write_side_files(self.path, texts, self.lineage)

    def _index(self) -> str:
        sizes = [nbytes(*d) for shard in self._shards for d in shard.layout.values()]
        where = {name: shard.path.name for name, shard in self._home.items()}
        return json_text({"metadata": {"total_size": sum(sizes)}, "weight_map": where})


def write_side_files(
    folder: Path, texts: Mapping[str, str | bytes], lineage: AnyObject | None
) -> None:
    """Write the texts beside the tensors of a folder, a card unless it is there, and lineage."""
    texts = dict(texts)
    if lineage is not None:
        if CARD not in texts:
            with failure_warned(folder / CARD):
                texts[CARD] = model_card(lineage, json.loads(texts[CONFIG]))
        # last: its presence says that the rest is there
        texts[LINEAGE] = json_text(lineage)
    for name, content in texts.items():
        data = content.encode("utf-8") if isinstance(content, str) else content
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        with path.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if path.parent != folder:
            sync_folder(path.parent)


def require_room(folder: Path, size: int) -> None:
    """Raise ResourceError where a disk has less than `size` bytes left."""
    free = shutil.disk_usage(folder).free
    if size > free:
        raise ResourceError(f"{folder} needs {gib(size)}, {gib(free)} are free", OTHER_DISK)


def require_planned(
    name: str, parts: Sequence[torch.Tensor], planned: tuple[Shape, torch.dtype]
) -> None:
    """Raise ValueError where the parts of a tensor are not the shape and type that was planned."""
    described = {(joined_shape(parts), part.dtype) for part in parts}
    if described != {planned}:
        raise ValueError(f"{name} was planned as {planned}, got {described}")


def joined_shape(parts: Sequence[torch.Tensor]) -> Shape:
    """Shape of tensors that lie one behind the other; ValueError for rows of different sizes."""
    if len(parts) == 1:
        return tuple(parts[0].shape)
    rows = {part.shape[1:] for part in parts}
    if len(rows) != 1:
        raise ValueError(f"rows of {len(rows)} shapes make no tensor")
    return (sum(len(part) for part in parts), *rows.pop())


def memory_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor, in the order of its elements."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _config_text(config: PretrainedConfig | AnyObject) -> str:
    return json_text(config) if isinstance(config, Mapping) else config.to_json_string()


def json_text(value: object) -> str:
    """A value as the files of a checkpoint spell it."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def nbytes(shape: Shape, dtype: torch.dtype) -> int:
    """Size of a tensor in bytes."""
    return torch.Size(shape).numel() * dtype.itemsize


def _header(
    layout: Mapping[str, tuple[Shape, torch.dtype]], metadata: dict[str, str], room: int
) -> tuple[bytes, dict[str, int]]:
    """The bytes before the tensors with `room` spare ones, and where each tensor starts."""
    entries: JsonObject = {"__metadata__": metadata}
    begin: dict[str, int] = {}
    offset = 0
    # widest types first keeps every tensor aligned to its element size
    for name, (shape, dtype) in sorted(layout.items(), key=lambda item: -item[1][1].itemsize):
        end = offset + nbytes(shape, dtype)
        entries[name] = {
            "dtype": _CODES[dtype],
            "shape": list(shape),
            "data_offsets": [offset, end],
        }
        begin[name], offset = offset, end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8 + room)
    head = len(text).to_bytes(8, "little") + text
    return head, {name: len(head) + at for name, at in begin.items()}


def write_at(fd: int, data: memoryview, offset: int) -> None:
    """Write all of `data` from a byte of an open file on."""
    while data:
        done = os.pwrite(fd, data, offset)
        data, offset = data[done:], offset + done
