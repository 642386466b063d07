"""Open a checkpoint by what its container is; only what reads numbers loads torch."""

import os
from pathlib import Path

from mambactl.checkpoint.reader import Reader
from mambactl.checkpoint.resolve import resolve
from mambactl.checkpoint.safetensors_reader import FolderReader, SingleFileReader
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
    if any(source.path.glob(SAFETENSORS)):
        return FolderReader(source.path)
    if any(source.path.glob(PICKLES)):
        from mambactl.checkpoint.pickle_reader import PickleReader

        return PickleReader(source.path)
    return _refuse_folder(source.path)


def _refuse_folder(folder: Path) -> Reader:
    if not os.path.isfile(folder / CONFIG):
        raise ModelError(
            f"{folder} is not a checkpoint: it has neither {CONFIG} nor weights",
            "give the folder that holds config.json and *.safetensors",
        )
    raise ModelError(f"{folder} has no weights (*.safetensors, pytorch_model*.bin)", "copy them in")
