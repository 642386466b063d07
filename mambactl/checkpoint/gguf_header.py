"""The header of a GGUF: its counts and lengths checked against the file, and the keys we read.

The library believes every count, so a damaged one would keep it busy for hours.
"""

import math
import mmap
import os
import re
import struct
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field

from mambactl.bounds import GGUF_ITEMS, TENSORS
from mambactl.checkpoint.config_fields import Fields, Layers, Number, Positions, Size, Small, Token
from mambactl.errors import ModelError
from mambactl.foreign import AGAIN

_MAGIC = b"GGUF"
# format of every scalar type by its number; strings and arrays are apart
_SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
_STRING, _ARRAY = 8, 9
_MOST_DIMENSIONS = 8
# no type packs more weights into a byte
_WEIGHTS_PER_BYTE = 8


class FileFields(Fields):
    """Metadata of a GGUF that every architecture has."""

    file_type: int | None = Field(None, alias="general.file_type")
    bos: Token | None = Field(None, alias="tokenizer.ggml.bos_token_id")
    eos: Token | None = Field(None, alias="tokenizer.ggml.eos_token_id")
    eot: Token | None = Field(None, alias="tokenizer.ggml.eot_token_id")
    pad: Token | None = Field(None, alias="tokenizer.ggml.padding_token_id")

    @property
    def ends(self) -> int | list[int] | None:
        """Id of the token that ends a text; also that of an answer's end if it is another one."""
        if self.eot is None or self.eot == self.eos:
            return self.eos
        return self.eot if self.eos is None else [self.eos, self.eot]


class LlamaFields(Fields):
    """Sizes of a Llama."""

    width: Size = Field(alias="llama.embedding_length")
    inner: Size = Field(alias="llama.feed_forward_length")
    layers: Layers = Field(alias="llama.block_count")
    heads: Size = Field(alias="llama.attention.head_count")
    shared_heads: Size | None = Field(None, alias="llama.attention.head_count_kv")
    head_dim: Size | None = Field(None, alias="llama.attention.key_length")
    context: Positions = Field(alias="llama.context_length")
    epsilon: Small = Field(alias="llama.attention.layer_norm_rms_epsilon")
    rope_base: Number = Field(10000.0, alias="llama.rope.freq_base")
    expert_count: int | None = Field(None, alias="llama.expert_count")
    scaling: str = Field("none", alias="llama.rope.scaling.type")
    factor: Number | None = Field(None, alias="llama.rope.scaling.factor")
    # what older files have in place of both
    linear: Number | None = Field(None, alias="llama.rope.scale_linear")


class TokenizerFields(Fields):
    """A vocabulary and how text is cut."""

    model: str = Field(alias="tokenizer.ggml.model")
    pre: str | None = Field(None, alias="tokenizer.ggml.pre")
    tokens: list[str] = Field(alias="tokenizer.ggml.tokens")
    scores: list[float] | None = Field(None, alias="tokenizer.ggml.scores")
    token_type: list[int] | None = Field(None, alias="tokenizer.ggml.token_type")
    merges: list[str] | None = Field(None, alias="tokenizer.ggml.merges")
    bos: Token | None = Field(None, alias="tokenizer.ggml.bos_token_id")
    eos: Token | None = Field(None, alias="tokenizer.ggml.eos_token_id")
    unk: Token | None = Field(None, alias="tokenizer.ggml.unknown_token_id")
    pad: Token | None = Field(None, alias="tokenizer.ggml.padding_token_id")
    add_bos: bool | None = Field(None, alias="tokenizer.ggml.add_bos_token")
    chat_template: str | None = Field(None, alias="tokenizer.chat_template")


# the end of the name of one file of several
_PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")


def all_parts(path: Path) -> list[Path]:
    """The files of the model that `path` is a part of, in order; ModelError where one is missing.

    The first has the metadata of all.
    """
    match = _PART.search(path.name)
    if match is None:
        return [path]
    count, stem = int(match[2]), path.name[: match.start()]
    names = [f"{stem}-{number:05d}-of-{match[2]}.gguf" for number in range(1, count + 1)]
    missing = [name for name in names if not os.path.exists(path.parent / name)]
    if missing or not names:
        raise ModelError(
            f"{path} is one of {count} files, and {', '.join(missing[:3]) or 'none'} is not there",
            "put all parts in one folder",
        )
    return [path.parent / name for name in names]


def check_header(path: Path, size: int) -> None:
    """Raise ModelError for counts and lengths beyond a file of `size` bytes, or beyond the bounds.

    struct.error means a header that ends too early.
    """
    if not size:
        raise ModelError(f"{path} is empty", AGAIN)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        if content[: len(_MAGIC)] != _MAGIC:
            raise ModelError(f"{path} is not a GGUF", AGAIN)
        version = struct.unpack_from("<I", content, len(_MAGIC))[0]
        # a version that looks huge is one of the other byte order
        walk = _Walk(path, content, ">" if version & 0xFFFF == 0 else "<", 2 * len(_MAGIC))
        tensors, pairs = walk.number("Q"), walk.number("Q")
        if tensors > TENSORS.most:
            raise ModelError(f"{path} names {tensors:,} tensors, {TENSORS} are the most", AGAIN)
        walk.count(pairs)
        for _ in range(pairs):
            walk.text()
            walk.value(walk.number("I"))
        weights = sum(walk.tensor() for _ in range(tensors))
        if weights > _WEIGHTS_PER_BYTE * size:
            raise ModelError(f"{path} describes more weights than it holds", AGAIN)


@dataclass
class _Walk:
    """A position in a header."""

    path: Path
    content: mmap.mmap
    order: str
    position: int
    items: int = 0

    def number(self, kind: str) -> int:
        form = self.order + kind
        value = struct.unpack_from(form, self.content, self.position)[0]
        self.position += struct.calcsize(form)
        return value

    def skip(self, size: int) -> None:
        self.position += size
        if self.position > len(self.content):
            raise ModelError(f"{self.path} is truncated: its header goes beyond its end", AGAIN)

    def count(self, items: int) -> None:
        self.items += items
        if self.items > GGUF_ITEMS.most:
            raise ModelError(
                f"{self.path} names more than {GGUF_ITEMS}, the most for {GGUF_ITEMS.of}", AGAIN
            )

    def text(self) -> None:
        self.skip(self.number("Q"))

    def value(self, kind: int) -> None:
        if kind == _STRING:
            self.text()
        elif kind == _ARRAY:
            self._array(self.number("I"), self.number("Q"))
        elif kind in _SCALARS:
            self.skip(struct.calcsize(_SCALARS[kind]))
        else:
            raise ModelError(f"{self.path} holds a value of the unknown type {kind}", AGAIN)

    def _array(self, kind: int, length: int) -> None:
        self.count(length)
        if kind == _STRING:
            for _ in range(length):
                self.text()
        elif kind in _SCALARS:
            self.skip(length * struct.calcsize(_SCALARS[kind]))
        else:
            raise ModelError(f"{self.path} holds an array of the unknown type {kind}", AGAIN)

    def tensor(self) -> int:
        """The number of weights of the next tensor."""
        self.text()
        dimensions = self.number("I")
        if dimensions > _MOST_DIMENSIONS:
            raise ModelError(f"{self.path} holds a tensor of {dimensions} dimensions", AGAIN)
        shape = [self.number("Q") for _ in range(dimensions)]
        # type and offset
        self.skip(4 + 8)
        return math.prod(shape)
