"""Open a checkpoint by what its container is; only what reads numbers loads torch."""

import os
from pathlib import Path

from mambactl.checkpoint.mambainllama_reader import MAMBA_CONFIG, ReleasedReader
from mambactl.checkpoint.reader import Reader
from mambactl.checkpoint.resolve import resolve
from mambactl.checkpoint.safetensors_reader import WEIGHTS, FolderReader, SingleFileReader
from mambactl.errors import ModelError
from mambactl.files import CONFIG, Source

# of a folder, the files that hold weights
SAFETENSORS, PICKLES = "*.safetensors*", "pytorch_model*.bin*"


def require_container(source: Source) -> None:
    """Raise ModelError for a folder that holds no weights of a known kind; nothing is opened."""
    if source.kind == "folder" and not any(
        any(source.path.glob(pattern)) for pattern in (SAFETENSORS, PICKLES)
    ):
        _refuse_folder(source.path)


def open_checkpoint(source: Source | str) -> Reader:
    """Open any supported container; raises ModelError with what is wrong with it."""
    if isinstance(source, str):
        source = resolve(source)
    if source.kind == "gguf":
        from mambactl.checkpoint.gguf_reader import GgufReader

        return GgufReader(source.path)
    if source.kind == "file":
        return SingleFileReader(source.path)
    reader = _open_folder(source.path)
    return ReleasedReader(reader) if os.path.exists(source.path / MAMBA_CONFIG) else reader


def _open_folder(folder: Path) -> Reader:
    complete = any(os.path.exists(folder / name) for name in WEIGHTS)
    pickled = any(folder.glob(PICKLES))
    # other safetensors, of an adapter say, may lie beside whole weights in pickles
    if complete or (not pickled and any(folder.glob(SAFETENSORS))):
        return FolderReader(folder)
    if pickled:
        from mambactl.checkpoint.pickle_reader import PickleReader

        return PickleReader(folder)
    return _refuse_folder(folder)


def _refuse_folder(folder: Path) -> Reader:
    if not os.path.isfile(folder / CONFIG):
        raise ModelError(
            f"{folder} is not a checkpoint: it has neither {CONFIG} nor weights",
            "give the folder that holds config.json and *.safetensors",
        )
    raise ModelError(f"{folder} has no weights (*.safetensors, pytorch_model*.bin)", "copy them in")
