"""Write checkpoints as a stream of tensors, so that OUT either does not exist or is complete.

The format is the safetensors file format (8 byte length, JSON header, raw tensors); its own
library needs every tensor at once, which a 16 GB model on a laptop does not allow.
"""

import base64
import json
import os
import shutil
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mambactl.checkpoint.card import model_card
from mambactl.checkpoint.reader import DTYPES
from mambactl.console import failure_warned
from mambactl.errors import OutputError, ResourceError
from mambactl.files import (
    BINARY_PREFIX,
    CARD,
    CONFIG,
    LINEAGE,
    RUN_FILE,
    SINGLE_FILE_SUFFIXES,
    explained,
    gib,
    hold,
    partial_of,
)
from mambactl.models.mixers.spec import FLOAT32_PARAMETERS

DEFAULT_SHARD_BYTES = 5_000_000_000
# a single file's header comes first, but its lineage may hold what writing the tensors found out
LATE_LINEAGE_BYTES = 1 << 17

_CODES = {dtype: code for code, dtype in DTYPES.items()}
_OTHER_DISK = "free some space or choose another disk with -o"

Shape = tuple[int, ...]


@dataclass
class _Shard:
    """One safetensors file being filled; `start` maps names to byte offsets in it."""

    path: Path
    fd: int
    start: dict[str, int]
    layout: dict[str, tuple[Shape, torch.dtype]] = field(default_factory=dict)
    head_bytes: int = 0


class CheckpointWriter:
    """Stream tensors into OUT.partial and rename it to OUT when all of them are there.

    `out` ending in .st or .safetensors becomes one file that carries everything. Raises
    OutputError if OUT exists without `force` or is being written, ResourceError on a full disk.
    `lineage` may be set on the writer until the end.
    """

    def __init__(
        self,
        out: Path,
        config: Any,
        side_files: Mapping[str, str | bytes],
        lineage: Mapping[str, Any] | None,
        force: bool = False,
        max_shard_bytes: float = DEFAULT_SHARD_BYTES,
    ):
        self.out = Path(os.path.abspath(out))
        self.partial = partial_of(self.out)
        self.single = self.out.suffix in SINGLE_FILE_SUFFIXES
        self.config, self.side_files, self.lineage = config, dict(side_files), lineage
        self.force, self.max_shard_bytes = force, max_shard_bytes
        self._shards: list[_Shard] = []
        self._home: dict[str, _Shard] = {}
        self._pending: set[str] = set()
        self._lock: int | None = None
        self._committed = False

    def __enter__(self):
        with self._explained():
            refuse_existing(self.out, self.force)
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self._take_partial()
            try:
                # its last owner may have finished in the meantime
                refuse_existing(self.out, self.force)
            except OutputError:
                self._release()
                raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                with self._explained():
                    self._commit()
        finally:
            self._release()

    def plan(self, tensors: Mapping[str, tuple[Shape, torch.dtype]]) -> None:
        """Declare every tensor; must come before the first write."""
        total = sum(_nbytes(*described) for described in tensors.values())
        with self._explained():
            free = shutil.disk_usage(self.out.parent).free
            if total > free:
                raise ResourceError(
                    f"{self.out} needs {gib(total)}, {gib(free)} are free", _OTHER_DISK
                )
            groups = [dict(tensors)] if self.single else self._split(tensors)
            for number, group in enumerate(groups, 1):
                self._open_shard(self._shard_path(number, len(groups)), group)
        self._pending = set(tensors)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Store one planned tensor; raises ValueError when it is not as planned."""
        shard = self._home[name]
        described = (tuple(tensor.shape), tensor.dtype)
        if described != shard.layout[name]:
            raise ValueError(f"{name} was planned as {shard.layout[name]}, got {described}")
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        with self._explained():
            _write_at(shard.fd, memoryview(raw), shard.start[name])
        self._pending.discard(name)

    def _take_partial(self) -> None:
        lock = hold(self.partial, self.out, folder=not self.single)
        try:
            folder = self.partial.is_dir()
            if folder:
                self._refuse_run_state()
            # what lies there is from a run that died; no one holds its lock
            if not folder:
                os.ftruncate(lock, 0)
            elif self.single:
                _remove(self.partial)
            else:
                _empty(self.partial)
        except BaseException:
            os.close(lock)
            raise
        if folder and self.single:
            os.close(lock)
            self._take_partial()
        else:
            self._lock = lock

    def _refuse_run_state(self) -> None:
        # a checkpoint that was not finished has files alone; training keeps hours of work there
        if not self.force and any(p.name == RUN_FILE or p.is_dir() for p in self.partial.iterdir()):
            raise OutputError(
                f"{self.partial} holds the state of an unfinished run",
                "finish it with --resume, discard it with --force, or choose another -o",
            )

    def _split(self, tensors: Mapping[str, tuple[Shape, torch.dtype]]) -> list[dict]:
        groups: list[dict] = [{}]
        filled = 0
        for name, described in tensors.items():
            size = _nbytes(*described)
            if groups[-1] and filled + size > self.max_shard_bytes:
                groups.append({})
                filled = 0
            groups[-1][name] = described
            filled += size
        return groups

    def _shard_path(self, number: int, count: int) -> Path:
        if self.single:
            return self.partial
        if count == 1:
            return self.partial / "model.safetensors"
        return self.partial / f"model-{number:05d}-of-{count:05d}.safetensors"

    def _open_shard(self, path: Path, layout: dict[str, tuple[Shape, torch.dtype]]) -> None:
        head, start = _header(layout, self._metadata(), LATE_LINEAGE_BYTES if self.single else 0)
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        shard = _Shard(path, fd, start, layout, len(head))
        self._shards.append(shard)
        self._home.update(dict.fromkeys(layout, shard))
        _write_at(fd, memoryview(head), 0)

    def _rewrite_header(self, shard: _Shard) -> None:
        """Put the final lineage into the room that was left for it."""
        head, _ = _header(shard.layout, self._metadata(), 0)
        room = shard.head_bytes - len(head)
        if room < 0:
            raise ValueError(f"the lineage is {-room} bytes longer than the header has room for")
        head, _ = _header(shard.layout, self._metadata(), room)
        _write_at(shard.fd, memoryview(head), 0)

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
            metadata[LINEAGE] = _json(self.lineage)
        return metadata

    def _commit(self) -> None:
        if self._pending or not self._shards:
            raise ValueError(f"{len(self._pending)} planned tensors were never written")
        if self.single:
            self._rewrite_header(self._shards[0])
        for shard in self._shards:
            os.fsync(shard.fd)
        if not self.single:
            self._write_side_files()
            _sync_folder(self.partial)
        refuse_existing(self.out, self.force)
        aside = self.out.with_name(f"{self.out.name}.replaced-{os.getpid()}")
        replaced = self.out.exists()
        if replaced:
            os.rename(self.out, aside)
        try:
            os.rename(self.partial, self.out)
            self._committed = True
        except BaseException:
            if replaced:
                os.rename(aside, self.out)
            raise
        _sync_folder(self.out.parent)
        if replaced:
            _remove(aside)

    def _write_side_files(self) -> None:
        texts: dict[str, str | bytes] = {CONFIG: _config_text(self.config), **self.side_files}
        if len(self._shards) > 1:
            texts["model.safetensors.index.json"] = self._index()
        if self.lineage is not None:
            with failure_warned(self.out / CARD):
                texts[CARD] = model_card(self.lineage, json.loads(texts[CONFIG]))
            # last: its presence says that the rest is there
            texts[LINEAGE] = _json(self.lineage)
        for name, content in texts.items():
            data = content.encode("utf-8") if isinstance(content, str) else content
            with (self.partial / name).open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())

    def _index(self) -> str:
        sizes = [_nbytes(*d) for shard in self._shards for d in shard.layout.values()]
        where = {name: shard.path.name for name, shard in self._home.items()}
        return _json({"metadata": {"total_size": sum(sizes)}, "weight_map": where})

    def _release(self) -> None:
        for shard in self._shards:
            os.close(shard.fd)
        self._shards = []
        if self._lock is not None:
            # after the rename that name may belong to the next writer
            if not self._committed:
                _remove(self.partial)
            os.close(self._lock)
            self._lock = None

    def _explained(self) -> AbstractContextManager[None]:
        return explained(self.out, _OTHER_DISK)


def save_model(
    model: Any,
    out: Path,
    side_files: Mapping[str, str | bytes],
    lineage: Mapping[str, Any] | None,
    force: bool = False,
    max_shard_bytes: float = DEFAULT_SHARD_BYTES,
) -> Path:
    """Write a loaded model; the state space parameters are stored in fp32 whatever it runs in."""
    state = model.state_dict()
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    shapes = {name: (tuple(t.shape), stored_dtype(name, t.dtype)) for name, t in state.items()}
    writer = CheckpointWriter(out, model.config, side_files, lineage, force, max_shard_bytes)
    with writer:
        writer.plan(shapes)
        for name, tensor in state.items():
            writer.write(name, tensor.to(shapes[name][1]))
    return writer.out


def stored_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """fp32 for A_log, D and dt_bias, which decide over thousands of steps; `dtype` otherwise."""
    return torch.float32 if name.rsplit(".", 1)[-1] in FLOAT32_PARAMETERS else dtype


def refuse_existing(out: Path, force: bool) -> None:
    """Raise OutputError when `out` is taken and may not be replaced."""
    if not out.exists():
        return
    if not force:
        raise OutputError(f"{out} exists already", "add --force to replace it, or another -o")
    # replacing deletes: never a folder that is not a checkpoint
    if out.is_dir() and any(out.iterdir()) and not (out / CONFIG).is_file():
        raise OutputError(f"{out} is a folder with other content", "choose another place with -o")


def _config_text(config: Any) -> str:
    return _json(config) if isinstance(config, Mapping) else config.to_json_string()


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _nbytes(shape: Shape, dtype: torch.dtype) -> int:
    return torch.Size(shape).numel() * dtype.itemsize


def _header(
    layout: Mapping[str, tuple[Shape, torch.dtype]], metadata: dict[str, str], room: int
) -> tuple[bytes, dict[str, int]]:
    """The bytes before the tensors with `room` spare ones, and where each tensor starts."""
    entries: dict[str, Any] = {"__metadata__": metadata}
    begin: dict[str, int] = {}
    offset = 0
    # widest types first keeps every tensor aligned to its element size
    for name, (shape, dtype) in sorted(layout.items(), key=lambda item: -item[1][1].itemsize):
        end = offset + _nbytes(shape, dtype)
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


def _write_at(fd: int, data: memoryview, offset: int) -> None:
    while data:
        done = os.pwrite(fd, data, offset)
        data, offset = data[done:], offset + done


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
