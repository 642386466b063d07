"""Write a GGUF as a stream of tensors, in the types that llama.cpp computes with."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import torch
from torch import Tensor

from mambactl.checkpoint.adapted import in_dtype
from mambactl.checkpoint.container import (
    Shape,
    json_text,
    memory_of,
    require_planned,
    require_room,
    write_at,
)
from mambactl.errors import ModelError
from mambactl.files import remove
from mambactl.present import present

Kind = gguf.GGMLQuantizationType
Value = bool | int | float | str | list[int] | list[float] | list[str]


@dataclass(frozen=True)
class FileType:
    """The storage type of most tensors of a GGUF, and its `llama_ftype` number."""

    kind: Kind
    number: int


FILE_TYPES = {
    "float32": FileType(Kind.F32, gguf.LlamaFileType.ALL_F32),
    "float16": FileType(Kind.F16, gguf.LlamaFileType.MOSTLY_F16),
    "bfloat16": FileType(Kind.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "q8_0": FileType(Kind.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}
# what llama.cpp reads as float32 although it has two dimensions
_FLOAT32 = ("ssm_a", "ssm_d", "ssm_conv1d.weight", "ssm_norm.weight")
# projections of recurrent layers, whose rounding stays in the state: of a distilled SmolLM2 in
# q8_0 they cause most of the loss (0.029 nats per token with them, 0.008 without)
_HALVES = ("ssm_in.weight", "ssm_x.weight", "ssm_dt.weight", "ssm_out.weight")
_ROWS = 4096
_QUANTIZATION_VERSION = 2


@dataclass(frozen=True)
class _Planned:
    shape: Shape
    dtype: torch.dtype
    kind: Kind
    start: int


class GgufFile:
    """A GGUF being written at `path`; its lineage goes into the file `beside` it.

    `metadata` are the keys of its header, with their whole names; `file_type` is a name in
    `FILE_TYPES`.
    """

    def __init__(
        self,
        path: Path,
        beside: Path,
        architecture: str,
        metadata: Mapping[str, Value],
        file_type: str,
        lineage: Mapping[str, object] | None,
    ):
        self.path, self.lineage = path, lineage
        self._beside, self._architecture = beside, architecture
        self._metadata, self._type = metadata, FILE_TYPES[file_type]
        self._planned: dict[str, _Planned] = {}
        self._pending: set[str] = set()
        self._fd: int | None = None

    def plan(self, tensors: Mapping[str, tuple[Shape, torch.dtype]]) -> None:
        """Declare every tensor; must come before the first write."""
        kinds = {name: self._kind(name, shape) for name, (shape, _) in tensors.items()}
        sizes = {name: _stored_bytes(tensors[name][0], kind) for name, kind in kinds.items()}
        require_room(self.path.parent, sum(sizes.values()))
        remove(self.path)
        header = gguf.GGUFWriter(self.path, self._architecture)
        for key, value in self._metadata.items():
            _add(header, key, value)
        header.add_file_type(self._type.number)
        header.add_quantization_version(_QUANTIZATION_VERSION)
        for name, (shape, _) in tensors.items():
            # given a type of its own, the library looks at this one no more
            any_type = np.dtype(np.float32)
            header.add_tensor_info(name, shape, any_type, sizes[name], kinds[name])
        header.open_output_file(self.path)
        header.write_header_to_file()
        header.write_kv_data_to_file()
        header.write_ti_data_to_file()
        header.close()
        self._fd = os.open(self.path, os.O_RDWR)
        start = header.ggml_pad(os.fstat(self._fd).st_size, header.data_alignment)
        for name, described in tensors.items():
            self._planned[name] = _Planned(*described, kinds[name], start)
            start += header.ggml_pad(sizes[name], header.data_alignment)
        os.ftruncate(self._fd, start)
        self._pending = set(tensors)

    def write(self, name: str, *parts: Tensor) -> None:
        """Store one planned tensor or its parts; raises ValueError when it is not as planned."""
        planned = self._planned[name]
        require_planned(name, parts, (planned.shape, planned.dtype))
        start = planned.start
        for part in parts:
            for content in _encoded(name, part, planned.kind):
                write_at(present(self._fd), content, start)
                start += len(content)
        self._pending.discard(name)

    def close(self) -> None:
        """Flush everything to the disk; raises ValueError where a planned tensor is missing."""
        if self._pending or self._fd is None:
            raise ValueError(f"{len(self._pending)} planned tensors were never written")
        os.fsync(self._fd)
        self.release()
        if self.lineage is not None:
            self._beside.write_text(json_text(self.lineage), "utf-8")

    def release(self) -> None:
        """Close the file."""
        if self._fd is not None:
            os.close(self._fd)
        self._fd = None

    def _kind(self, name: str, shape: Shape) -> Kind:
        part, kind = name.split(".", 2)[-1], self._type.kind
        if len(shape) < 2 or part in _FLOAT32:
            return Kind.F32
        block, _ = gguf.GGML_QUANT_SIZES[kind]
        # float16 also holds rows that are no whole number of blocks
        fine = kind == Kind.F32 or (part not in _HALVES and shape[-1] % block == 0)
        return kind if fine else Kind.F16


def _add(header: gguf.GGUFWriter, key: str, value: Value) -> None:
    if isinstance(value, bool):
        header.add_bool(key, value)
    elif isinstance(value, int):
        header.add_uint32(key, value)
    elif isinstance(value, float):
        header.add_float32(key, value)
    elif isinstance(value, str):
        header.add_string(key, value)
    else:
        header.add_array(key, value)


def _stored_bytes(shape: Shape, kind: Kind) -> int:
    block, size = gguf.GGML_QUANT_SIZES[kind]
    return torch.Size(shape).numel() // block * size


def _encoded(name: str, tensor: Tensor, kind: Kind) -> Iterator[memoryview]:
    """The bytes of a tensor, a block of rows at a time where they are quantised."""
    if kind == Kind.F32:
        yield memory_of(tensor.float())
    elif kind == Kind.F16:
        with _hinted("use --dtype float32"):
            half = in_dtype(name, tensor, torch.float16)
        yield memory_of(half)
    elif kind == Kind.BF16:
        yield memory_of(in_dtype(name, tensor, torch.bfloat16))
    else:
        for rows in tensor.split(_ROWS):
            quantised = gguf.quantize(rows.float().contiguous().numpy(), kind)
            yield np.ascontiguousarray(quantised).reshape(-1).data


@contextmanager
def _hinted(hint: str) -> Iterator[None]:
    """Errors of the block with another hint: some tensors have 16 bits in every smaller type."""
    try:
        yield
    except ModelError as error:
        raise ModelError(str(error), hint) from error
