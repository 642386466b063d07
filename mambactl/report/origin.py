"""Origin of a checkpoint by its lineage: the command that would make it again."""

import json
import shlex
from pathlib import Path

from pydantic import BaseModel

from mambactl.commands import COMMANDS
from mambactl.errors import MambactlError
from mambactl.files import LINEAGE
from mambactl.foreign import fitted
from mambactl.json_values import JsonObject


class _Parent(BaseModel):
    path: str | None = None


class _Lineage(BaseModel):
    """Fields of a lineage that are read here."""

    stage: str | None = None
    parent: _Parent | None = None
    recipe: JsonObject | None = None
    versions: JsonObject | None = None


def lineage_of(checkpoint: Path) -> JsonObject:
    """The lineage of a folder or a single file; empty where there is none."""
    from mambactl.checkpoint.safetensors_reader import read_lineage

    try:
        lineage = read_lineage(checkpoint) or {}
        fitted(_Lineage, lineage, checkpoint, LINEAGE)
        return lineage
    except MambactlError:
        # a file of another kind, or none: what made it is then not known
        return {}


def command_of(lineage: JsonObject) -> str:
    """The command line with every option that is not at its default."""
    stage, parent = lineage.get("stage"), lineage.get("parent") or {}
    if stage not in COMMANDS:
        return ""
    words = ["mambactl", stage, str(parent.get("path") or "-")]
    fields = COMMANDS[stage].options.model_fields
    for name, value in (lineage.get("recipe") or {}).items():
        if name not in fields or value != fields[name].default:
            text = value if isinstance(value, str) else json.dumps(value)
            words += ["--set", f"{name}={text}"]
    return shlex.join(words)
