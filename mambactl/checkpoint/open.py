"""Open a checkpoint with the reader of its container."""

from pathlib import Path

from mambactl.checkpoint.gguf_reader import GgufReader
from mambactl.checkpoint.reader import FolderReader, PickleReader, Reader, SingleFileReader
from mambactl.checkpoint.resolve import resolve
from mambactl.checkpoint.source import Source
from mambactl.errors import ModelError
from mambactl.files import CONFIG


def open_checkpoint(source: Source | str) -> Reader:
    """Open any supported container; raises ModelError with what is wrong with it."""
    if isinstance(source, str):
        source = resolve(source)
    if source.kind == "gguf":
        return GgufReader(source.path)
    if source.kind == "file":
        return SingleFileReader(source.path)
    if any(source.path.glob("*.safetensors*")):
        return FolderReader(source.path)
    if any(source.path.glob("pytorch_model*.bin*")):
        return PickleReader(source.path)
    return _refuse_folder(source.path)


def _refuse_folder(folder: Path) -> Reader:
    if not (folder / CONFIG).is_file():
        raise ModelError(
            f"{folder} is not a checkpoint: it has neither {CONFIG} nor weights",
            "give the folder that holds config.json and *.safetensors",
        )
    raise ModelError(f"{folder} has no weights (*.safetensors, pytorch_model*.bin)", "copy them in")
