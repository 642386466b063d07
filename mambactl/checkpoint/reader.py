"""Read checkpoints lazily, one tensor at a time, whatever container holds them.

Containers: a safetensors folder (one file or an index), a single `.st`, pickled `.bin` weights
(restricted unpickling, memory mapped) and a GGUF.
"""

import base64
import json
import math
import pickle
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PretrainedConfig

from mambactl.errors import MambactlError, ModelError
from mambactl.files import BINARY_PREFIX, CONFIG, LINEAGE, SIDE_FILES
from mambactl.models.config import HybridConfig

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
# pages of a mapped file count as resident until it is closed, so close it now and then
_REMAP_BYTES = 256 << 20


class Reader:
    """One open checkpoint: config, side files, lineage, and tensors on demand."""

    def __init__(self, path: Path):
        self.path = path

    config: Mapping[str, Any]
    files: Mapping[str, str | bytes]
    lineage: dict[str, Any] | None = None

    def names(self) -> list[str]:
        """Tensor names in file order."""
        raise NotImplementedError

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor, without reading it."""
        raise NotImplementedError

    def dtype(self, name: str) -> torch.dtype:
        """Type of one tensor, without reading it."""
        raise NotImplementedError

    def get(self, name: str) -> torch.Tensor:
        """Read one tensor to host memory."""
        raise NotImplementedError

    def close(self) -> None:
        """Release open files."""

    def __enter__(self):
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _MappedReader(Reader):
    """Tensors spread over one or several weight files, one file mapped at a time."""

    def __init__(self, path: Path, where: dict[str, Path]):
        super().__init__(path)
        self._where = where
        self._described: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        self._open: tuple[Path, Callable[[str], torch.Tensor]] | None = None
        self._mapped = 0

    def _map(self, file: Path) -> Callable[[str], torch.Tensor]:
        raise NotImplementedError

    def names(self) -> list[str]:
        return list(self._described)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._described[name][0]

    def dtype(self, name: str) -> torch.dtype:
        return self._described[name][1]

    def get(self, name: str) -> torch.Tensor:
        file = self._where[name]
        if self._open is None or self._open[0] != file or self._mapped > _REMAP_BYTES:
            self.close()
            self._open = (file, self._map(file))
        tensor = self._open[1](name)
        self._mapped += tensor.nbytes
        return tensor

    def close(self) -> None:
        self._open, self._mapped = None, 0


class _SafetensorsReader(_MappedReader):
    """Tensors in safetensors files, described by their headers."""

    def _map(self, file: Path) -> Callable[[str], torch.Tensor]:
        return _open_safetensors(file).get_tensor

    def _describe(self, files: list[Path]) -> None:
        for file in files:
            with _open_safetensors(file) as handle:
                for name in handle.keys():  # noqa: SIM118  the handle is no mapping
                    if name in self._where and self._where[name] != file:
                        continue
                    part = handle.get_slice(name)
                    self._described[name] = (tuple(part.get_shape()), _dtype(part, name, file))
        if lost := [name for name in self._where if name not in self._described]:
            raise ModelError(
                f"{self._where[lost[0]]} lacks {len(lost)} tensors that the index names, "
                f"first {lost[0]}",
                "fetch that file again",
            )


class FolderReader(_SafetensorsReader):
    """A Hugging Face folder with `model.safetensors` or a sharded set and its index."""

    def __init__(self, folder: Path):
        self.config = read_config(folder)
        index = folder / "model.safetensors.index.json"
        single = folder / "model.safetensors"
        if index.is_file():
            where = _read_index(index)
        elif single.is_file():
            where = {}
        else:
            raise ModelError(
                f"{folder} has safetensors files but neither model.safetensors nor its index",
                "fetch model.safetensors.index.json too",
            )
        super().__init__(folder, where)
        self._describe(sorted(set(where.values())) or [single])
        if not where:
            self._where = dict.fromkeys(self._described, single)
        self.lineage = read_lineage(folder)

    @cached_property
    def files(self) -> dict[str, str | bytes]:
        return read_side_files(self.path)


class SingleFileReader(_SafetensorsReader):
    """One `.st` file that carries everything in its metadata, or sits beside a config.json."""

    def __init__(self, file: Path):
        super().__init__(file, {})
        self._describe([file])
        self._where = dict.fromkeys(self._described, file)
        with _open_safetensors(file) as handle:
            metadata = handle.metadata() or {}
        if CONFIG in metadata:
            self.config = parse(metadata[CONFIG], file, CONFIG)
            self.files = {name: _unpack(metadata[name]) for name in SIDE_FILES if name in metadata}
            if LINEAGE in metadata:
                self.lineage = parse(metadata[LINEAGE], file, LINEAGE)
            return
        if not (file.parent / CONFIG).is_file():
            raise ModelError(
                f"{file} carries no config and there is no {CONFIG} beside it",
                "give a file that mambactl wrote, or the whole folder",
            )
        self.config = read_config(file.parent)
        self.files = read_side_files(file.parent)
        self.lineage = read_lineage(file.parent)


class PickleReader(_MappedReader):
    """A folder of `pytorch_model*.bin` files, unpickled without running any code."""

    def __init__(self, folder: Path):
        self.config = read_config(folder)
        index = folder / "pytorch_model.bin.index.json"
        if index.is_file():
            where = _read_index(index)
        else:
            single = folder / "pytorch_model.bin"
            where = dict.fromkeys(_load_pickle(single), single)
        super().__init__(folder, where)
        for file in sorted(set(where.values())):
            for name, tensor in _load_pickle(file).items():
                if where.get(name) == file:
                    self._described[name] = (tuple(tensor.shape), tensor.dtype)
        if lost := where.keys() - self._described.keys():
            raise ModelError(f"{folder} lacks {min(lost)}, which its index names", "fetch it again")
        self.lineage = read_lineage(folder)

    def _map(self, file: Path) -> Callable[[str], torch.Tensor]:
        return _load_pickle(file).__getitem__

    @cached_property
    def files(self) -> dict[str, str | bytes]:
        return read_side_files(self.path)


def _open_safetensors(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except FileNotFoundError as error:
        raise ModelError(f"{file} is missing", "fetch the checkpoint again") from error
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"{file} is truncated or not a safetensors file ({error})", "fetch it again"
        ) from error


def _dtype(part: Any, name: str, file: Path) -> torch.dtype:
    stored = part.get_dtype()
    if stored not in DTYPES:
        raise ModelError(f"{file}: {name} is stored as {stored}", "give an unquantised checkpoint")
    return DTYPES[stored]


def _load_pickle(file: Path) -> dict[str, torch.Tensor]:
    if not file.is_file():
        raise ModelError(f"{file} is missing", "fetch the checkpoint again")
    try:
        with file.open("rb") as start:
            zipped = start.read(2) == b"PK"
        # files from before torch 1.6 are no zip archives and cannot be mapped
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"{file} is damaged or holds more than tensors, and loading it could run code",
            "convert it to safetensors where you trust it",
        ) from error
    except (RuntimeError, EOFError, OSError) as error:
        reason = str(error).split("\n")[0]
        raise ModelError(f"{file} cannot be read: {reason}", "fetch it again") from error
    return {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}


def read_text(path: Path) -> str:
    """The text of a file; raises ModelError that names it."""
    try:
        return path.read_text("utf-8")
    except (UnicodeDecodeError, OSError) as error:
        raise ModelError(f"{path} cannot be read: {error}", "fetch it again") from error


@contextmanager
def blame(path: Path, names: str) -> Iterator[None]:
    """Turn what a library raises on a damaged file into a ModelError that names the file."""
    try:
        yield
    except (MambactlError, MemoryError):
        raise
    except Exception as error:  # libraries raise many types on a bad file
        reason = str(error).strip().split("\n")[0]
        message = f"{path}: {names} cannot be used ({type(error).__name__}: {reason})"
        raise ModelError(message, "fetch it again, or mend the file") from error


def parse(text: str, path: Path, name: str) -> dict[str, Any]:
    """The JSON object in the file `name` of the checkpoint `path`; raises ModelError."""
    try:
        value = json.loads(text, object_hook=_special_float)
    except json.JSONDecodeError as error:
        raise ModelError(f"{path}: {name} is not valid JSON ({error})", "fetch it again") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: {name} is not a JSON object", "fetch it again")
    return value


def _special_float(value: dict[str, Any]) -> Any:
    # how transformers spells infinity, which JSON lacks
    return float(value["__float__"]) if value.keys() == {"__float__"} else value


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a folder; raises ModelError."""
    path = folder / CONFIG
    if not path.is_file():
        raise ModelError(f"{folder} has no {CONFIG}", "give a folder in the Hugging Face layout")
    return parse(read_text(path), folder, CONFIG)


def read_lineage(checkpoint: Path) -> dict[str, Any] | None:
    """The mambactl.json of a folder, or in the header of a single file, if it has one."""
    if checkpoint.is_dir():
        path = checkpoint / LINEAGE
        return parse(read_text(path), checkpoint, LINEAGE) if path.is_file() else None
    with _open_safetensors(checkpoint) as handle:
        text = (handle.metadata() or {}).get(LINEAGE)
    return None if text is None else parse(text, checkpoint, LINEAGE)


def _read_index(index: Path) -> dict[str, Path]:
    names = parse(read_text(index), index.parent, index.name).get("weight_map")
    if not names:
        raise ModelError(f"{index} has no weight_map", "fetch it again")
    # a name with a folder part could point outside of the checkpoint
    return {name: index.parent / Path(file).name for name, file in names.items()}


def read_side_files(folder: Path) -> dict[str, str | bytes]:
    """Tokenizer, template and generation files of a folder, by name."""
    found: dict[str, str | bytes] = {}
    for name in SIDE_FILES:
        if (path := folder / name).is_file():
            binary = name.endswith(".model")
            found[name] = path.read_bytes() if binary else read_text(path)
    return found


def _unpack(text: str) -> str | bytes:
    if text.startswith(BINARY_PREFIX):
        return base64.b64decode(text.removeprefix(BINARY_PREFIX))
    return text


Config = TypeVar("Config", bound=PretrainedConfig)


@dataclass(frozen=True)
class Adapted:
    """`names` maps our tensor names to those in the source."""

    config: HybridConfig
    names: dict[str, str]

    def get(self, reader: Reader, name: str) -> Tensor:
        """Read one tensor by our name; raises ModelError where a number in it is not finite."""
        tensor = reader.get(self.names[name])
        require_finite(reader.path, self.names[name], tensor)
        return tensor


def require_finite(path: Path, name: str, tensor: Tensor) -> None:
    """Raise ModelError where a number in a tensor of a checkpoint is not finite."""
    if not finite(tensor):
        raise ModelError(
            f"{path}: {name} holds NaN or infinite numbers",
            "the checkpoint is damaged, or its training diverged: give another one",
        )


def finite(tensor: Tensor) -> bool:
    """Whether all values are finite, in one pass that copies nothing if they are."""
    # a sum of finite numbers may overflow, but a sum with others is never finite
    return math.isfinite(tensor.sum()) or bool(torch.isfinite(tensor).all())


def in_dtype(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in another type; raises ModelError where a weight is too large for that."""
    result = tensor.to(dtype)
    # bfloat16 ends where float32 does, but for rounding
    narrower = 2 * torch.finfo(dtype).max < torch.finfo(tensor.dtype).max
    if narrower and not finite(result):
        kind = str(dtype).removeprefix("torch.")
        raise ModelError(f"{name} holds numbers too large for {kind}", "use --dtype bfloat16")
    return result


def build_config(reader: Reader, family: type[Config], fields: Mapping[str, Any]) -> Config:
    """Build a configuration, turning a contradiction in it into a ModelError."""
    try:
        return family.from_dict(dict(fields))
    except (ValueError, TypeError, KeyError, StrictDataclassError) as error:
        raise ModelError(
            f"the config of {reader.path} is not usable: {str(error).strip()}",
            "fetch the checkpoint again, or correct config.json",
        ) from error


def same_names(reader: Reader, config: HybridConfig) -> dict[str, str]:
    """Identity, without what a checkpoint may repeat: rotary tables and a tied head."""
    tied = config.tie_word_embeddings
    return {
        name: name
        for name in reader.names()
        if not name.endswith("rotary_emb.inv_freq") and not (tied and name == "lm_head.weight")
    }
