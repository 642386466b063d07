"""Rows as tokens, kept from run to run: a file of data is tokenised once.

An entry belongs to the bytes of one file and to all that decides what becomes of them: tokenizer,
chat template, what is learned of a chat, libraries, and the day where a template may print it. It
holds the rows that runs have needed so far, each found by a digest of what it says. An entry is a
copy of what can be made again, so it is never trusted: types, lengths, token ids and a digest of
the content are checked, and one with a fault is named and made anew.
"""

import hashlib
import json
import os
import stat
from collections.abc import Mapping
from contextlib import suppress
from datetime import date
from functools import cached_property, lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from mambactl import console
from mambactl.bounds import VOCABULARY
from mambactl.checkpoint.safetensors_reader import open_safetensors
from mambactl.data.chat_template import prints_date
from mambactl.data.encoding import Example
from mambactl.data.row_files import is_on_hub
from mambactl.data.sources import Document
from mambactl.errors import ModelError
from mambactl.files import cache_dir, replacing
from mambactl.foreign import blamed
from mambactl.present import present
from mambactl.ranks import is_main

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# of what this module writes and `data.format` makes: another number is another entry
ENCODING = 2
FOLDER, SUFFIX = "tokens", ".tokens"
# bytes of a file from which on reading an entry is faster than tokenising
LEAST_BYTES = 1 << 21
# of all entries: the oldest go first
MOST_BYTES = 8 << 30
LIBRARIES = ("tokenizers", "transformers", "jinja2")
ROW_DIGEST = 16


class Rows(NamedTuple):
    """Rows concatenated into flat arrays.

    digests: uint8 [n, 16]; starts: int64 [n + 1]; ids: int32 [tokens]; mask: uint8, a bit a token.
    """

    digests: np.ndarray
    starts: np.ndarray
    ids: np.ndarray
    mask: np.ndarray

    @property
    def sha256(self) -> str:
        """Digest of the content."""
        digest = hashlib.sha256()
        for part in self:
            digest.update(np.ascontiguousarray(part).data)
        return digest.hexdigest()


class Entry:
    """Cached rows of one data file, and those that this run adds."""

    def __init__(self, path: Path, vocabulary: int):
        self.path, self.vocabulary = path, vocabulary
        self.kept: Rows | None = None
        self.index: dict[bytes, int] = {}
        self.added: dict[bytes, Example] = {}
        self._read()

    def find(self, digest: bytes) -> Example | None:
        """The tokens of a row; None where it has not been tokenised yet."""
        number = self.index.get(digest)
        if number is None:
            return self.added.get(digest)
        kept = present(self.kept)
        start, end = kept.starts[number : number + 2].tolist()
        bits = np.unpackbits(kept.mask[start // 8 : -(-end // 8)])
        mask = bits[start % 8 : start % 8 + end - start].astype(bool)
        return Example(kept.ids[start:end], mask)

    def _read(self) -> None:
        if not os.path.lexists(self.path):
            return
        try:
            self.kept = read_rows_of(self.path, self.vocabulary)
        except ModelError as error:
            console.warn(f"{error}: its rows are tokenised again")
            return
        # the newest entries stay longest
        with suppress(OSError):
            os.utime(self.path)
        self.index = {row.tobytes(): number for number, row in enumerate(self.kept.digests)}

    def publish(self) -> None:
        """Write the entry with the rows that were added; a failure is a warning."""
        if not self.added:
            return
        with console.failure_warned(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # a name of its own: another process may be writing the same entry
            own = self.path.with_name(f"{self.path.stem}-{os.getpid()}{SUFFIX}")
            with replacing(own) as new:
                new.chmod(0o600)
                _write(new, self._all())
            os.replace(own, self.path)
            drop_oldest(self.path.parent)

    def _all(self) -> Rows:
        added = list(self.added.values())
        digests = np.frombuffer(b"".join(self.added), np.uint8).reshape(-1, ROW_DIGEST)
        lengths = [len(example.input_ids) for example in added]
        ids = np.concatenate([example.input_ids for example in added])
        mask = np.concatenate([example.loss_mask for example in added])
        if self.kept is not None:
            count = int(self.kept.starts[-1])
            digests = np.concatenate([self.kept.digests, digests])
            lengths = [*np.diff(self.kept.starts).tolist(), *lengths]
            ids = np.concatenate([self.kept.ids, ids])
            mask = np.concatenate([np.unpackbits(self.kept.mask)[:count].astype(bool), mask])
        starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        return Rows(digests, starts, ids.astype(np.int32), np.packbits(mask))


def read_rows_of(path: Path, vocabulary: int) -> Rows:
    """The rows of an entry; ModelError for a file that is not ours, damaged, or no such entry."""
    with blamed(path):
        status = os.lstat(path)
    mine = stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid()
    if not mine or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ModelError(f"{path} is no file that this user alone may write")
    if status.st_size > MOST_BYTES:
        raise ModelError(f"{path} is larger than all entries together may be")
    with open_safetensors(path) as handle, blamed(path):
        said = handle.metadata() or {}
        if set(handle.keys()) != set(Rows._fields):
            raise ModelError(f"{path} is no entry of tokens")
        rows = Rows(*(handle.get_tensor(name) for name in Rows._fields))
    count = len(rows.digests)
    kinds = [part.dtype for part in rows] == [np.uint8, np.int64, np.int32, np.uint8]
    shaped = kinds and rows.digests.shape[1:] == (ROW_DIGEST,) and rows.starts.shape == (count + 1,)
    if not shaped or rows.ids.ndim != 1 or rows.mask.ndim != 1:
        raise ModelError(f"{path} is no entry of tokens")
    starts, tokens = rows.starts, len(rows.ids)
    ordered = starts[0] == 0 and starts[-1] == tokens and bool((np.diff(starts) >= 0).all())
    if not ordered or len(rows.mask) != -(-tokens // 8):
        raise ModelError(f"{path} is damaged: its rows have no place in it")
    if tokens and not (rows.ids.min() >= 0 and rows.ids.max() < vocabulary):
        raise ModelError(f"{path} is damaged: it holds tokens that the tokenizer has not")
    if said.get("sha256") != rows.sha256:
        raise ModelError(f"{path} is damaged: its content is not what was written")
    return rows


def _write(path: Path, rows: Rows) -> None:
    from safetensors.numpy import save_file

    tensors = {name: np.ascontiguousarray(part) for name, part in rows._asdict().items()}
    save_file(tensors, path, metadata={"sha256": rows.sha256})


def drop_oldest(folder: Path, most: int | None = None) -> None:
    """Delete the entries that were not used for longest, until all fit in `most` bytes."""
    found = []
    for path in folder.glob(f"*{SUFFIX}*"):
        with suppress(OSError):
            status = path.lstat()
            found.append((status.st_mtime, status.st_size, path))
    room = MOST_BYTES if most is None else most
    for _, size, path in sorted(found, reverse=True):
        room -= size
        if room < 0:
            with suppress(OSError):
                path.unlink()


class TokenCache:
    """Tokens of rows of files on this disk, by what one tokenizer makes of them."""

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        assistant_only: bool,
        day: date | None = None,
        asked: Mapping[str, bool] | None = None,
    ):
        self.tokenizer, self.assistant_only = tokenizer, assistant_only
        self.day, self.asked = day or date.today(), asked or {}
        self.entries: dict[str | None, Entry | None] = {}

    @cached_property
    def settings(self) -> dict[str, object] | None:
        """Settings of the tokenizer in the cache key, collected for the first large file."""
        found = _settings(self.tokenizer, self.assistant_only, self.day)
        return found and found | {name: True for name, value in self.asked.items() if value}

    def find(self, row: Document) -> Example | None:
        """The tokens of a row, if they are kept."""
        entry = self._entry(row)
        return None if entry is None else entry.find(digest_of(row))

    def add(self, row: Document, example: Example) -> None:
        """Keep the tokens of a row."""
        entry = self._entry(row)
        if entry is not None:
            entry.added[digest_of(row)] = example

    def publish(self) -> None:
        """Write what was added, for runs to come."""
        for entry in filter(None, self.entries.values()):
            if is_main():
                entry.publish()

    def _entry(self, row: Document) -> Entry | None:
        spec = row.spec
        if spec not in self.entries:
            self.entries[spec] = self._open(spec)
        return self.entries[spec]

    def _open(self, spec: str | None) -> Entry | None:
        if spec is None or is_on_hub(spec):
            return None
        try:
            status = os.stat(spec)
            if status.st_size < LEAST_BYTES or self.settings is None:
                return None
            content = _content_digest(spec, status.st_size, status.st_mtime_ns)
        except OSError:
            return None
        about = json.dumps(self.settings | {"file": content}, sort_keys=True)
        name = hashlib.sha256(about.encode()).hexdigest()
        vocabulary = min(len(self.tokenizer), VOCABULARY.most)
        return Entry(cache_dir() / FOLDER / f"{name}{SUFFIX}", vocabulary)


def digest_of(row: Document) -> bytes:
    """16 bytes that stand for what a row says."""
    text = json.dumps(row, ensure_ascii=False, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=ROW_DIGEST).digest()


@lru_cache
def _content_digest(path: str, size: int, changed: int) -> str:
    """sha256 of a file of that size, changed last at that time."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _settings(
    tokenizer: "PreTrainedTokenizerBase", assistant_only: bool, day: date
) -> dict[str, object] | None:
    """Settings of the tokenizer for the cache key; None if it cannot be serialized."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    template = tokenizer.chat_template
    # `padding` and `truncation` of the file are set anew in every call
    described = [backend.to_str(), template, tokenizer.special_tokens_map]
    text = json.dumps(described, sort_keys=True, default=str)
    settings: dict[str, object] = {
        "encoding": ENCODING,
        "tokenizer": hashlib.sha256(text.encode()).hexdigest(),
        "split_special_tokens": bool(getattr(tokenizer, "split_special_tokens", False)),
        "assistant_only": assistant_only,
        "libraries": {name: version(name) for name in LIBRARIES},
    }
    return settings | ({"day": day.isoformat()} if prints_date(tokenizer) else {})
