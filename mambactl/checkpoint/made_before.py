"""An output that is there already: what was asked for, or something else."""

import json
import os
from pathlib import Path
from typing import Any

from mambactl.commands import Command
from mambactl.errors import OutputError
from mambactl.options import StageConfig


def made_before(
    out: Path, command: Command, config: StageConfig, source: str, *, resume: bool, force: bool
) -> dict[str, Any] | None:
    """The lineage of `out` if it is what this command would make; None where it is to be made.

    Raises OutputError for an output that is there without `resume`, or that was made differently.
    """
    # unlike Path.exists this is no error for a name that is too long: resolving it says so
    if force or not os.path.exists(out):
        return None
    if not resume:
        hint = "--resume accepts it as done, --force replaces it, -o writes elsewhere"
        raise OutputError(f"{out} exists", hint)
    from mambactl.checkpoint.load import load_lineage
    from mambactl.checkpoint.provenance import header_digest
    from mambactl.checkpoint.resolve import resolve
    from mambactl.checkpoint.run_folder import differences

    # a file of rows has its lineage beside it
    found = _beside(out) if command.writes == "rows" else load_lineage(str(out))
    lineage = found or {}
    options = lineage.get("recipe", {})
    made = {
        "stage": lineage.get("stage"),
        "parent": lineage.get("parent", {}).get("sha256"),
        **{key: value for key, value in options.items() if key not in config.place},
    }
    asked = {
        "stage": command.name,
        "parent": header_digest(resolve(source).path),
        **config.model_dump(mode="json", exclude=config.place),
    }
    if changed := differences(made, asked):
        message = f"{out} was made differently: {'; '.join(changed)}"
        raise OutputError(message, "--force replaces it, -o writes elsewhere")
    return lineage


def _beside(out: Path) -> dict[str, Any] | None:
    from mambactl.checkpoint.run_folder import side_file
    from mambactl.files import LINEAGE

    try:
        return json.loads(side_file(out, LINEAGE).read_text("utf-8"))
    except (OSError, ValueError):
        return None
