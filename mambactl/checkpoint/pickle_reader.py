"""Folders of `pytorch_model*.bin` files, unpickled without running any code.

torch unpickles a short list of types only, but some of them can be asked for any amount of memory;
the names in a pickle, and the size of its archive, are therefore checked before it is loaded.
"""

import os
import pickletools
import re
import zipfile
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import IO

import torch

from mambactl.bounds import PICKLE_BYTES, TENSORS
from mambactl.checkpoint.reader import MappedReader, NumberType
from mambactl.checkpoint.side_files import (
    read_config,
    read_folder_lineage,
    read_index,
    read_side_files,
    require_few,
)
from mambactl.errors import ModelError
from mambactl.foreign import AGAIN, blamed, regular_size
from mambactl.present import present

# what dictionaries of plain tensors are pickled with
_PLAIN = re.compile(
    r"collections OrderedDict|torch\._utils _rebuild_(tensor_v2|tensor|parameter)"
    r"|torch (\w+Storage|Size|[a-z]+\d*)"
)
_CONVERT = "convert it to safetensors where you trust it"
# of a file from before torch 1.6: magic number, protocol, system, content, names of storages
_PICKLES_OF_OLD_FILES = 5
# an archive has a member for every storage, and a few more
_OTHER_MEMBERS = 16
_ZIP = b"PK"


class PickleReader(MappedReader):
    """Tensors of one pickled file, or of several that an index names."""

    def __init__(self, folder: Path):
        self.config = read_config(folder)
        index = folder / "pytorch_model.bin.index.json"
        if os.path.exists(index):
            where = read_index(index)
        else:
            single = folder / "pytorch_model.bin"
            where = dict.fromkeys(_load(single), single)
        super().__init__(folder, where)
        for file in sorted(set(where.values())):
            for name, tensor in _load(file).items():
                if where.get(name) == file:
                    self._described[name] = (tuple(tensor.shape), _number_type(tensor))
        if lost := where.keys() - self._described.keys():
            raise ModelError(f"{folder} lacks {min(lost)}, which its index names", "fetch it again")
        if not where:
            raise ModelError(f"{folder} holds no tensors", AGAIN)
        self.lineage = read_folder_lineage(folder)

    def _map(self, file: Path) -> Callable[[str], torch.Tensor]:
        return _load(file).__getitem__

    @cached_property
    def files(  # pyright: ignore[reportIncompatibleVariableOverride]
        self,
    ) -> Mapping[str, str | bytes]:
        return read_side_files(self.path)


def _number_type(tensor: torch.Tensor) -> NumberType:
    return NumberType(str(tensor.dtype).removeprefix("torch."), tensor.dtype.itemsize)


def _load(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file by name; whatever else it holds is left out."""
    if not os.path.exists(file):
        raise ModelError(f"{file} is missing", "fetch the checkpoint again")
    size = regular_size(file)
    with blamed(file), file.open("rb") as content:
        zipped = content.read(len(_ZIP)) == _ZIP
        content.seek(0)
        if zipped:
            _require_plain_archive(file, content, size)
        else:
            _require_plain_pickles(file, content)
        # files from before torch 1.6 are no zip archives and cannot be mapped
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)
    if not isinstance(state, dict):
        raise ModelError(f"{file} holds a {type(state).__name__}, not tensors by name", AGAIN)
    found = {
        name: tensor
        for name, tensor in state.items()
        if isinstance(name, str) and isinstance(tensor, torch.Tensor)
    }
    require_few(file, found)
    for name, tensor in found.items():
        if not _is_plain(tensor):
            raise ModelError(f"{file}: {name} is no plain tensor", _CONVERT)
    # two names of one tensor are common: of the embedding and the head
    if sum(tensor.nbytes for tensor in found.values()) > 2 * size:
        raise ModelError(f"{file} holds more numbers than its size", AGAIN)
    return found


def _is_plain(tensor: torch.Tensor) -> bool:
    """True if every number of a tensor is in the file."""
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
        return False
    return tensor.nbytes <= tensor.untyped_storage().nbytes()


def _require_plain_archive(file: Path, content: IO[bytes], size: int) -> None:
    """Raise ModelError unless an archive's members are as large as they seem."""
    with zipfile.ZipFile(content) as archive:
        members = archive.infolist()
        if len(members) > TENSORS.most + _OTHER_MEMBERS:
            raise ModelError(
                f"{file} holds {len(members):,} storages, {TENSORS} are the most", AGAIN
            )
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise ModelError(f"{file} is a compressed archive", _CONVERT)
        if sum(member.file_size for member in members) > size:
            raise ModelError(f"{file} holds more than its size", AGAIN)
        for member in members:
            if member.filename.endswith(".pkl"):
                if member.file_size > PICKLE_BYTES.most:
                    message = f"{file} has more than {PICKLE_BYTES}, the most for {PICKLE_BYTES.of}"
                    raise ModelError(message, _CONVERT)
                _require_plain(file, archive.read(member))


def _require_plain_pickles(file: Path, content: IO[bytes]) -> None:
    head = content.read(PICKLE_BYTES.most)
    start = 0
    for _ in range(_PICKLES_OF_OLD_FILES):
        start += _require_plain(file, head[start:])


def _require_plain(file: Path, pickled: bytes) -> int:
    """The length of a pickle; ModelError where it names anything but plain tensors."""
    length = 0
    for code, argument, position in pickletools.genops(pickled):
        # torch imports with GLOBAL alone
        imports = code.name in ("GLOBAL", "STACK_GLOBAL", "INST")
        if imports and not (code.name == "GLOBAL" and _PLAIN.fullmatch(str(argument))):
            raise ModelError(
                f"{file} holds more than tensors ({argument or code.name}), and loading it could "
                "run code",
                _CONVERT,
            )
        length = present(position) + 1
    return length
