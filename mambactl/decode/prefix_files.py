"""Beginnings of prompts on disk, for later processes: `--prefix-cache`.

A file holds `ids` [L] and every tensor of a cache of one row that has read them. Its name has L, a
digest of the ids, and one of whatever else decides the tensors (`model_key`); its header has the
whole digest, and a fingerprint of the tensors. Only a file with the names, types and shapes that
this model's cache has after L tokens is read, and only one with all digests is used. Files appear
whole; what writes or deletes holds a lock on the folder, so that processes may share it.
"""

import fcntl
import hashlib
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryFile
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from mambactl import console
from mambactl.checkpoint.reader import NUMBER_TYPES, NumberType
from mambactl.checkpoint.safetensors_reader import open_safetensors
from mambactl.decode.model_key import fingerprint, model_key
from mambactl.decode.prefill import read_in_pieces
from mambactl.errors import ModelError
from mambactl.files import explained, replacing, temporary_of
from mambactl.foreign import blamed
from mambactl.models.cache import HybridCache
from mambactl.models.hybrid import HybridModel

GB = 10**9
# digits of a digest in a name; the header has them all
_DIGITS = 32
_NAME = re.compile(
    rf"prefix-(?P<model>[0-9a-f]{{{_DIGITS}}})-(?P<length>\d{{1,8}})-(?P<ids>[0-9a-f]{{{_DIGITS}}})"
    r"\.safetensors"
)
IDS = "ids"
# newest files whose beginnings a prompt is compared with: each costs the reading of a header
RECENT = 64

Found = TypeVar("Found")


@dataclass(frozen=True)
class PrefixFolder:
    """A folder for kept beginnings, of all models, and the bytes that they may take together."""

    path: Path
    most: int

    @property
    def writable(self) -> bool:
        """True if this user may create files in the existing folder."""
        return os.access(self.path, os.W_OK | os.X_OK)

    def prepare(self) -> None:
        """Make the folder; raises OutputError where that, or writing into it, is impossible.

        One that others keep, read only for this user, is read from.
        """
        if self.path.is_dir() and not self.writable:
            console.warn(f"{self.path} is read only: what it keeps is used, and nothing is added")
            return
        refused = "name a folder that can be written with --prefix-cache"
        with explained(self.path, "free some space", refused):
            self.path.mkdir(parents=True, exist_ok=True)
            # shows a read-only file system before a model is loaded
            with TemporaryFile(dir=self.path):
                pass
        held = sum(entry.size for entry in self.entries())
        if held > self.most:
            console.log(
                f"{self.path} keeps {held / GB:.2g} GB, more than the {self.most / GB:.2g} of "
                "--prefix-cache-gb: what was used longest ago goes when something is added"
            )

    def entries(self) -> list["Entry"]:
        """Files with a name of ours; others in the folder are somebody else's."""
        found = []
        # a folder that is gone holds nothing, and `PrefixFiles.keep` will say so
        with suppress(OSError):
            for path in self.path.iterdir():
                if match := _NAME.fullmatch(path.name):
                    # another process may have deleted it
                    with suppress(FileNotFoundError):
                        found.append(Entry.of(path, match))
        return [entry for entry in found if stat.S_ISREG(entry.mode)]


class Entry(NamedTuple):
    """A file of the folder, as its name and the folder describe it."""

    path: Path
    model: str
    length: int
    ids: str
    mode: int
    used: int
    size: int

    @classmethod
    def of(cls, path: Path, name: re.Match[str]) -> "Entry":
        """The file at `path`, whose name was taken apart; a link is not followed."""
        status = path.lstat()
        facts = status.st_mode, status.st_mtime_ns, status.st_size
        return cls(path, name["model"], int(name["length"]), name["ids"], *facts)


class PrefixFiles:
    """The beginnings that a folder keeps for one model."""

    def __init__(self, folder: PrefixFolder, model: HybridModel):
        self.folder, self.model = folder, model
        self._unusable: set[Path] = set()
        self._writes = folder.writable

    def longest(self, tokens: Sequence[int]) -> HybridCache | None:
        """Load the cache of the longest stored prefix of `tokens`, which may be all of them."""
        own = [entry for entry in self._own() if entry.length <= len(tokens)]
        digests = _digests(tokens, {entry.length for entry in own})
        for entry in sorted(own, key=lambda entry: -entry.length):
            if entry.ids == digests[entry.length]:
                start = tokens[: entry.length]
                cache = self._tried(entry, lambda path, ids=start: self._read(path, ids))
                if cache is not None:
                    # the file of somebody else may be read only
                    with suppress(OSError):
                        os.utime(entry.path)
                    return cache
        return None

    def recent(self) -> Iterator[list[int]]:
        """The tokens of the beginnings that were used last."""
        for entry in sorted(self._own(), key=lambda entry: -entry.used)[:RECENT]:
            ids = self._tried(entry, lambda path, length=entry.length: _read_ids(path, length))
            if ids is not None:
                yield ids

    def keep(self, tokens: Sequence[int], cache: HybridCache) -> None:
        """Write what a cache of one row holds after `tokens`; a failure to do so is a warning."""
        if not self._writes:
            return
        length = len(tokens)
        ids = _digests(tokens, [length])[length]
        name = f"prefix-{self._key[:_DIGITS]}-{length}-{ids}.safetensors"
        path = self.folder.path / name
        # until it succeeds: a disk that is full fails once
        self._writes = False
        with console.failure_warned(path), self._locked():
            if path in self._unusable or not path.exists():
                self._write(path, tokens, cache)
            self._writes = True

    def _write(self, path: Path, tokens: Sequence[int], cache: HybridCache) -> None:
        parts = {IDS: torch.tensor(tokens, dtype=torch.int32), **_parts(cache, len(tokens))}
        size = sum(part.nbytes for part in parts.values())
        if size > self.folder.most:
            console.log(f"{path} is not kept: {size / GB:.1f} GB are more than --prefix-cache-gb")
            return
        self._make_room(size)
        parts = {name: part.detach().cpu().contiguous() for name, part in parts.items()}
        header = {"model": self._key, "digest": fingerprint(parts.items())}
        with replacing(path) as new:
            # the library lets only the owner read it: prompts are private
            save_file(parts, new, header)
        self._unusable.discard(path)

    def _make_room(self, size: int) -> None:
        """Delete what was used longest ago until `size` bytes more are within the bound."""
        # nobody else writes now, so that these were left by a process that was killed
        for left in self.folder.path.glob(temporary_of(Path("prefix-*")).name):
            left.unlink(missing_ok=True)
        entries = sorted(self.folder.entries(), key=lambda entry: entry.used)
        total = size + sum(entry.size for entry in entries)
        for entry in entries:
            if total > self.folder.most:
                entry.path.unlink(missing_ok=True)
                total -= entry.size

    def _read(self, path: Path, ids: Sequence[int]) -> HybridCache:
        """A cache of one row from a file; raises ModelError where anything does not fit."""
        blank = self._blank(len(ids))
        blanks = {IDS: torch.empty(len(ids), dtype=torch.int32), **_parts(blank, len(ids))}
        shapes = {name: (list(part.shape), _number_type(part)) for name, part in blanks.items()}
        with open_safetensors(path, "pt") as file, blamed(path):
            header = file.metadata() or {}
            if header.get("model") != self._key:
                raise ValueError("it was kept for another model or by other kernels")
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            held = {n: (s.get_shape(), NUMBER_TYPES.get(s.get_dtype())) for n, s in slices.items()}
            if held != shapes:
                raise ValueError("its tensors are not those of this model's cache")
            # copies, which nobody else can change between the check and the use
            parts = {name: file.get_tensor(name).clone() for name in shapes}
            if parts[IDS].tolist() != list(ids):
                raise ValueError("its tokens are others than its name says")
            if header.get("digest") != fingerprint(parts.items()):
                raise ValueError("its content is not what was written")
        del parts[IDS]
        return self._filled(blank, parts.values())

    def _filled(self, blank: HybridCache, parts: Iterable[Tensor]) -> HybridCache:
        """A cache with `parts` in the place of what `blank` holds, in order."""
        found = (part.to(d) for part, d in zip(parts, self._template[1], strict=True))
        for layer in blank.layers:
            layer.replace_tensors(lambda _: next(found))
        return blank

    def _blank(self, length: int) -> HybridCache:
        """A cache after `length` tokens of which only the shapes are there."""
        cache = HybridCache(self.model.config, 1, self.model.device)
        cache.layers = self._template[0].copies(1).layers
        for layer in cache.layers:
            layer.resize(length)
        cache.advance(length, length, permanent=True)
        return cache

    @cached_property
    def _template(self) -> tuple[HybridCache, list[torch.device]]:
        """The shapes of a cache that has read something, and where its tensors lie."""
        cache = HybridCache(self.model.config, 1, self.model.device)
        # two: kernels are compiled for a length of 1 by itself
        read_in_pieces(self.model, cache, [[0, 0]])
        devices = [tensor.device for tensor in _parts(cache, 2).values()]
        for layer in cache.layers:
            layer.replace_tensors(lambda tensor: tensor.to("meta"))
        return cache, devices

    @cached_property
    def _key(self) -> str:
        console.log("taking the digest of the weights for --prefix-cache")
        return model_key(self.model)

    def _tried(self, entry: Entry, read: Callable[[Path], Found]) -> Found | None:
        """Result of `read` for a file; None, and a warning, if the file cannot be used."""
        try:
            return read(entry.path)
        except ModelError as error:
            # another process may have deleted it
            if os.path.lexists(entry.path):
                self._unusable.add(entry.path)
                console.warn(f"{error}; its tokens are read again")
            return None

    def _own(self) -> list[Entry]:
        """Files of this model that nothing is known against."""
        own = self._key[:_DIGITS]
        entries = (entry for entry in self.folder.entries() if entry.model == own)
        return [entry for entry in entries if entry.path not in self._unusable]

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Lock the folder against other processes that would write into it or delete there."""
        fd = os.open(self.folder.path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)


def _parts(cache: HybridCache, length: int) -> dict[str, Tensor]:
    """Every tensor of a cache of one row by layer and number, cut to `length` tokens."""
    own = cache.copies(1)
    for layer in own.layers:
        layer.resize(length)
    return {
        f"{index}.{number}": tensor
        for index, layer in enumerate(own.layers)
        for number, tensor in enumerate(layer.tensors())
    }


def _number_type(tensor: Tensor) -> NumberType:
    return NumberType(str(tensor.dtype).removeprefix("torch."), tensor.itemsize)


def _digests(tokens: Sequence[int], lengths: Iterable[int]) -> dict[int, str]:
    """Digests of the first tokens, by their number."""
    ids, digest, at, found = np.asarray(tokens, "<i4"), hashlib.sha256(), 0, {}
    for length in sorted(lengths):
        digest.update(ids[at:length].tobytes())
        at, found[length] = length, digest.copy().hexdigest()[:_DIGITS]
    return found


def _read_ids(path: Path, length: int) -> list[int]:
    """The tokens in a file; raises ModelError where there are others than `length`."""
    with open_safetensors(path, "pt") as file, blamed(path):
        part = file.get_slice(IDS)
        if (part.get_shape(), part.get_dtype()) != ([length], "I32"):
            raise ValueError("it has other tokens than its name says")
        return part[:].tolist()
