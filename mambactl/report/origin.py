"""How a checkpoint was made, from what it carries: the command that would make it again."""

import json
import shlex
from pathlib import Path
from typing import Any

from mambactl.commands import COMMANDS
from mambactl.files import LINEAGE


def read_lineage(checkpoint: Path) -> dict[str, Any]:
    """The lineage of a folder, or of a single file from its header; empty where there is none."""
    from safetensors import SafetensorError, safe_open

    try:
        if checkpoint.is_dir():
            text = (checkpoint / LINEAGE).read_text("utf-8")
        else:
            with safe_open(checkpoint, "np") as file:
                text = (file.metadata() or {})[LINEAGE]
        found = json.loads(text)
    except (OSError, ValueError, KeyError, SafetensorError):
        # a file of another kind, or none: what made it is then not known
        return {}
    return found if isinstance(found, dict) else {}


def command_of(lineage: dict[str, Any]) -> str:
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
