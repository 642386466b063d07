"""The files of a checkpoint as everybody may see them: weights, texts, lineage without paths."""

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mambactl.checkpoint.card import about, model_card, with_about
from mambactl.checkpoint.container import Container, json_text
from mambactl.checkpoint.hub_names import hub_name
from mambactl.checkpoint.load import open_checkpoint, open_strict
from mambactl.checkpoint.local_names import local_paths, members_without_local_names
from mambactl.checkpoint.reader import Reader
from mambactl.checkpoint.safetensors_reader import header_metadata
from mambactl.checkpoint.side_files import read_config, read_index, read_side_files
from mambactl.console import progress
from mambactl.errors import ModelError, ResourceError
from mambactl.files import CARD, CONFIG, LINEAGE, Source, explained
from mambactl.foreign import json_object, read_bytes, read_text
from mambactl.json_values import AnyObject, JsonObject
from mambactl.models.config import HybridConfig
from mambactl.registration import STUB, STUB_TEXT, TYPE

_PICKLES = ("pytorch_model*.bin", "pytorch_model*.bin.index.json")
# patterns of names
WEIGHTS = ("*.safetensors", "*.safetensors.index.json", *_PICKLES)
_LICENCES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "NOTICE.txt", "USE_POLICY.md")
# of texts in which trainers leave where a model came from
_ORIGINS = ("name_or_path", "_file")
_OTHER_DISK = "free some space, or set TMPDIR to a folder on another disk"


@dataclass(frozen=True)
class PublicFiles:
    """Files of a checkpoint for upload, without local paths and names.

    `weights` are files on this disk, `texts` the content of the others but for the card; `lineage`
    names no path, and `known` are the paths that it named, which `card` may name still. `base` is
    the id of the model that the chain started from.
    """

    weights: Mapping[str, Path]
    texts: Mapping[str, bytes]
    lineage: JsonObject
    card: str
    known: tuple[str, ...]
    base: str | None


@contextmanager
def public_files(source: Source, repo: str) -> Iterator[PublicFiles]:
    """The files of a checkpoint of mambactl, under the names of a folder, for the hub's `repo`.

    A single file is unpacked for the block, beside which the disk needs its size; what is on disk
    stays as it is. Raises ModelError for a checkpoint that mambactl did not write, or a GGUF.
    """
    if source.kind == "gguf":
        raise ModelError(
            f"{source.path} is a GGUF, push takes checkpoints", "push the model it was made from"
        )
    if source.kind == "folder":
        ours = read_config(source.path).get("model_type") == TYPE
        reader, config = _opened(source) if ours else (open_checkpoint(source), None)
        with reader:
            yield _collected(source.path, repo, _lineage(reader), config)
        return
    reader, config = _opened(source)
    with reader, tempfile.TemporaryDirectory(prefix="mambactl-") as folder:
        lineage = _lineage(reader)
        unpacked = Path(folder) / "checkpoint"
        _unpack(reader, config, unpacked)
        yield _collected(unpacked, repo, lineage, config)


def _opened(source: Source) -> tuple[Reader, HybridConfig]:
    reader, adapted = open_strict(source)
    return reader, adapted.config


def _lineage(reader: Reader) -> JsonObject:
    if reader.lineage is None:
        raise ModelError(
            f"{reader.path} has no {LINEAGE}: mambactl did not make it",
            "push what a command of mambactl wrote; `hf upload` takes any folder",
        )
    return reader.lineage


def _unpack(reader: Reader, config: HybridConfig, folder: Path) -> None:
    """Write the folder that a single file stands for, without lineage and card."""
    file = Container(folder, False, config, reader.files, None)
    names = reader.names()
    try:
        with explained(folder, _OTHER_DISK, "set TMPDIR to a folder that can be written"):
            file.plan({name: (reader.shape(name), reader.dtype(name)) for name in names})
            with progress("unpack", len(names)) as task:
                for name in names:
                    file.write(name, reader.get(name))
                    task.advance()
            file.close()
    except ResourceError as error:
        raise ResourceError(str(error), _OTHER_DISK) from error
    finally:
        file.release()


def _collected(
    folder: Path, repo: str, lineage: JsonObject, config: HybridConfig | None
) -> PublicFiles:
    known = tuple(dict.fromkeys(local_paths(lineage)))
    public = members_without_local_names(lineage)
    texts = read_side_files(folder)
    # some programs have a configuration of their own beside config.json
    others = [*(path.name for path in folder.glob(f"*{CONFIG}")), *_LICENCES]
    for name in others:
        if (folder / name).is_file():
            texts[name] = read_bytes(folder / name)
    texts = {name: _without_origin(folder, name, content) for name, content in texts.items()}
    texts[LINEAGE] = json_text(public)
    if config is not None:
        texts[STUB] = STUB_TEXT
    card = _card(folder, repo, lineage, public, config)
    weights = {path.name: path for path in _weights(folder)}
    data = {
        name: content if isinstance(content, bytes) else content.encode()
        for name, content in texts.items()
    }
    return PublicFiles(weights, data, public, card, known, hub_name(lineage.get("source")))


def _weights(folder: Path) -> list[Path]:
    """The files that hold the tensors of a folder, and their index; ModelError for odd headers."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if not index.is_file() and not single.is_file():
        return sorted(path for pattern in _PICKLES for path in folder.glob(pattern))
    found = sorted(set(read_index(index).values())) if index.is_file() else [single]
    for path in found:
        said = header_metadata(path)
        if said != members_without_local_names(said):
            raise ModelError(
                f"the header of {path} names a path, user or host",
                "load the model with transformers, and write it with save_pretrained",
            )
    return [*found, *([index] if index.is_file() else [])]


def _without_origin(folder: Path, name: str, content: str | bytes) -> str | bytes:
    """A configuration without the path that it was loaded from; any other text as it is."""
    if not name.endswith("config.json"):
        return content
    values = json_object(content, folder, name)
    named = {key: value for key, value in values.items() if key.endswith(_ORIGINS)}
    public = members_without_local_names(named)
    return content if public == named else json_text(values | public)


def _card(
    folder: Path,
    repo: str,
    lineage: AnyObject,
    public: AnyObject,
    config: HybridConfig | None,
) -> str:
    """The card of the folder, or a new one, with the name on the hub in its example."""
    kept = read_text(folder / CARD) if (folder / CARD).is_file() else None
    if config is None:
        # of an export: its example is that of the other program
        name = repo.partition("/")[2]
        return (kept or f"# {name}\n").replace('from_pretrained("."', f'from_pretrained("{repo}"')
    return with_about(kept or model_card(lineage, config), about(public, config, repo))
