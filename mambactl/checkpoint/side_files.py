"""The text files of a checkpoint folder: config, index, lineage, tokenizer and templates."""

import os
from collections.abc import Iterable
from pathlib import Path

from mambactl.bounds import TENSORS
from mambactl.checkpoint.lineage_record import checked_lineage
from mambactl.errors import ModelError
from mambactl.files import CONFIG, LINEAGE, NAMED_TEMPLATES, SIDE_FILES, is_side_file
from mambactl.foreign import AGAIN, json_object, read_bytes, read_object, read_text
from mambactl.json_values import JsonObject


def parse_config(text: str | bytes, where: Path) -> JsonObject:
    """The object in a config.json of the checkpoint `where`; raises ModelError."""
    return json_object(text, where, CONFIG, object_hook=_special_float)


def _special_float(value: JsonObject) -> object:
    # how transformers spells infinity, which JSON lacks
    return float(value["__float__"]) if value.keys() == {"__float__"} else value


def read_config(folder: Path) -> JsonObject:
    """The config.json of a folder; raises ModelError."""
    path = folder / CONFIG
    if not os.path.lexists(path):
        raise ModelError(f"{folder} has no {CONFIG}", "give a folder in the Hugging Face layout")
    return parse_config(read_bytes(path), folder)


def read_folder_lineage(folder: Path) -> JsonObject | None:
    """The mambactl.json of a folder, if it has one."""
    path = folder / LINEAGE
    return checked_lineage(read_bytes(path), folder) if os.path.lexists(path) else None


def read_index(index: Path) -> dict[str, Path]:
    """The weight file of every tensor, as an index names them; raises ModelError."""
    names = read_object(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise ModelError(f"{index} has no weight_map", AGAIN)
    require_few(index, names)
    for name, file in names.items():
        # a name with a folder part would point outside of the checkpoint
        plain = isinstance(file, str) and file not in ("", ".", "..") and not set(file) & set("/\0")
        if not plain:
            message = f"{index} puts {name} into {file!r}, which is no name of a file beside it"
            raise ModelError(message, AGAIN)
    return {name: index.parent / file for name, file in names.items()}


def require_few(file: Path, names: Iterable[str]) -> None:
    """Raise ModelError where there are more tensors than the bound."""
    if (count := len(list(names))) > TENSORS.most:
        raise ModelError(
            f"{file} names {count:,} tensors, {TENSORS} are the most for {TENSORS.of}", AGAIN
        )


def read_side_files(folder: Path) -> dict[str, str | bytes]:
    """Tokenizer, template and generation files of a folder, by name."""
    found: dict[str, str | bytes] = {}
    others = (folder / NAMED_TEMPLATES).glob("*")
    named = sorted(f"{NAMED_TEMPLATES}/{path.name}" for path in others)
    for name in (*SIDE_FILES, *filter(is_side_file, named)):
        if os.path.lexists(path := folder / name):
            found[name] = read_bytes(path) if name.endswith(".model") else read_text(path)
    return found
