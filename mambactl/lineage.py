"""Lineage of a checkpoint (mambactl.json): how it was made, and how a model passes it on."""

import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from mambactl.errors import ModelError
from mambactl.files import CARD, LINEAGE
from mambactl.foreign import read_object, read_text
from mambactl.json_values import AnyObject, JsonObject
from mambactl.requirements import installed
from mambactl.version import __version__

SCHEMA = 1
_PACKAGES = ("torch", "transformers", "safetensors")


def stage_record(
    stage: str,
    parent: AnyObject | None,
    link: Mapping[str, str | None],
    teacher: str | None = None,
    options: AnyObject | None = None,
    seed: int | None = None,
    metrics: AnyObject | None = None,
) -> JsonObject:
    """The content of mambactl.json; `parent` is that of the checkpoint at `link["path"]`.

    `source` is the model the chain started from, `ancestors` the stages since, oldest first.
    """
    ancestors: list[JsonObject] = []
    if parent is not None:
        kept = {key: value for key, value in parent.items() if key not in ("ancestors", "versions")}
        ancestors = [*parent.get("ancestors", []), kept]
    return {
        "schema": SCHEMA,
        "stage": stage,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        # a synthetic model has no source, and is that of what follows
        "source": (parent or {}).get("source") or link["path"],
        "teacher": teacher or (parent or {}).get("teacher"),
        "parent": dict(link),
        # the key that checkpoints have always had
        "recipe": dict(options or {}),
        "seed": seed,
        "metrics": dict(metrics or {}),
        "versions": _versions(),
        "ancestors": ancestors,
    }


def _versions() -> dict[str, str]:
    found = {"mambactl": __version__, "python": platform.python_version()}
    held = {package: installed(package) for package in _PACKAGES}
    return found | {package: number for package, number in held.items() if number}


@dataclass(frozen=True)
class Origin:
    """Lineage and card of the checkpoint at `path`, of a model that came from it."""

    path: Path
    lineage: AnyObject
    card: str | None = None

    def write(self, folder: Path, stage: str) -> None:
        """Put the card into a folder, and a lineage with one more stage."""
        record = stage_record(stage, self.lineage, {"path": str(self.path), "sha256": None})
        text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
        (folder / LINEAGE).write_text(text, encoding="utf-8")
        if self.card is not None:
            (folder / CARD).write_text(self.card, encoding="utf-8")


def origin_of(folder: Path) -> Origin | None:
    """Origin recorded in a checkpoint folder; None for one that mambactl did not make."""
    try:
        record = read_object(folder / LINEAGE)
        if record.get("schema") != SCHEMA or not isinstance(record.get("stage"), str):
            return None
        card = read_text(folder / CARD) if (folder / CARD).is_file() else None
    except ModelError:
        return None
    return Origin(folder, record, card)
