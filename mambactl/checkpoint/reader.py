"""Read checkpoints lazily, one tensor at a time, whatever container holds them.

torch is loaded by what reads numbers: names, shapes and types need none.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from mambactl.foreign import blamed
from mambactl.json_values import AnyObject, JsonObject

if TYPE_CHECKING:
    import torch


class NumberType(NamedTuple):
    """Number type of a stored tensor: its name in torch, and bytes per number."""

    name: str
    itemsize: int


# as headers of safetensors name them
NUMBER_TYPES = {
    "F64": NumberType("float64", 8),
    "F32": NumberType("float32", 4),
    "F16": NumberType("float16", 2),
    "BF16": NumberType("bfloat16", 2),
    "I64": NumberType("int64", 8),
    "I32": NumberType("int32", 4),
    "I16": NumberType("int16", 2),
    "I8": NumberType("int8", 1),
    "U8": NumberType("uint8", 1),
    "BOOL": NumberType("bool", 1),
}
# pages of a mapped file count as resident until it is closed, so close it now and then
_REMAP_BYTES = 256 << 20


class Reader:
    """One open checkpoint: config, side files, lineage, and tensors on demand."""

    def __init__(self, path: Path):
        self.path = path

    config: AnyObject
    files: Mapping[str, str | bytes]
    lineage: JsonObject | None = None

    def names(self) -> list[str]:
        """Tensor names in file order."""
        raise NotImplementedError

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor, without reading it."""
        raise NotImplementedError

    def number_type(self, name: str) -> NumberType:
        """Number type of one tensor, from the header alone."""
        raise NotImplementedError

    def dtype(self, name: str) -> "torch.dtype":
        """Number type of one tensor as a torch dtype, from the header alone."""
        import torch

        return getattr(torch, self.number_type(name).name)

    def get(self, name: str) -> "torch.Tensor":
        """Read one tensor to host memory."""
        raise NotImplementedError

    def close(self) -> None:
        """Release open files."""

    def __enter__(self):
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class MappedReader(Reader):
    """Tensors spread over one or several weight files, one file mapped at a time."""

    def __init__(self, path: Path, where: dict[str, Path]):
        super().__init__(path)
        self._where = where
        self._described: dict[str, tuple[tuple[int, ...], NumberType]] = {}
        self._open: tuple[Path, Callable[[str], torch.Tensor]] | None = None
        self._mapped = 0

    def _map(self, file: Path) -> "Callable[[str], torch.Tensor]":
        raise NotImplementedError

    def names(self) -> list[str]:
        return list(self._described)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._described[name][0]

    def number_type(self, name: str) -> NumberType:
        return self._described[name][1]

    def get(self, name: str) -> "torch.Tensor":
        file = self._where[name]
        if self._open is None or self._open[0] != file or self._mapped > _REMAP_BYTES:
            self.close()
            self._open = (file, self._map(file))
        with blamed(file, name):
            tensor = self._open[1](name)
        self._mapped += tensor.nbytes
        return tensor

    def close(self) -> None:
        self._open, self._mapped = None, 0
