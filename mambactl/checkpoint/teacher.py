"""The model that a checkpoint is compared with, and the limits of a lineage's choice.

A lineage is part of a file that somebody else may have written. It names the teacher and nothing
else: the name is shown before anything is read, and leads to weights alone.
"""

import os

from mambactl import console
from mambactl.checkpoint.hub_names import ALIASES
from mambactl.checkpoint.load import load_lineage, needs_remote_code
from mambactl.checkpoint.resolve import called_teacher, resolve
from mambactl.errors import ModelError, UsageError
from mambactl.files import CONFIG, Source
from mambactl.foreign import read_object
from mambactl.json_values import JsonObject

_TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


def teacher_of(source: str, given: str | None, option: str, trusted: bool = False) -> str:
    """The model that is given, else the teacher or the origin in the lineage of `source`.

    `trusted`: code that models ship is allowed, which a person means of models that they name.
    Raises UsageError that names `option` when neither is known, ModelError for one that is not
    there, and for one that a lineage must not choose.
    """
    if given:
        _found(given, None)
        return given
    spec = named_teacher(source)
    if not spec:
        raise UsageError(
            f"{source} does not say what it was made from",
            hint=f"name the model to compare with: {option} MODEL",
        )
    console.log(f"teacher: {spec} (lineage of {source})")
    if _from_hub(source) and spec not in ALIASES and os.path.exists(os.path.expanduser(spec)):
        raise ModelError(
            f"{source} is from the hub and names {spec} as its teacher, a path of this machine",
            f"{option} {spec} reads it",
        )
    found = _found(spec, f"{source} was made from it; if it moved: {option} MODEL")
    if reason := _beyond_weights(found, trusted):
        raise ModelError(
            f"{spec}, the teacher that {source} names, {reason}", f"give {option} to read it"
        )
    return spec


def named_teacher(source: str) -> str | None:
    """The teacher or the origin that a lineage names."""
    lineage = load_lineage(source) or {}
    spec = lineage.get("teacher") or lineage.get("source")
    if spec is not None and not (isinstance(spec, str) and min(spec, default=" ") >= " "):
        raise ModelError(
            f"the lineage of {source} names a teacher that is no path", "fetch it again"
        )
    return spec


def _found(spec: str, hint: str | None) -> Source:
    with called_teacher(hint):
        return resolve(spec)


def _from_hub(source: str) -> bool:
    """True if a checkpoint lies in the cache of the hub's client."""
    from huggingface_hub import constants

    path = os.path.realpath(resolve(source).path.parent)
    return os.path.commonpath([path, cache := os.path.realpath(constants.HF_HUB_CACHE)]) == cache


def _beyond_weights(source: Source, trusted: bool) -> str | None:
    """Reason that reading the model takes more than weights and tables; None if it does not."""
    if source.kind != "folder":
        return None
    if any(source.path.glob("pytorch_model*.bin*")) and not any(source.path.glob("*.safetensors*")):
        return "is a pickle (pytorch_model*.bin)"
    if trusted and _ships_code(source):
        return "ships code of its own"
    return None


def _ships_code(source: Source) -> bool:
    config, tokenizer = (_content(source, name) for name in (CONFIG, _TOKENIZER[1]))
    own_tokenizer = bool(tokenizer.get("auto_map")) and not (source.path / _TOKENIZER[0]).exists()
    return own_tokenizer or needs_remote_code(config, source.path)


def _content(source: Source, name: str) -> JsonObject:
    path = source.path / name
    return read_object(path) if path.exists() else {}
