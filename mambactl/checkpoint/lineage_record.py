"""mambactl.json as it is read: how a checkpoint was made, checked once, here."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict

from mambactl.errors import ModelError
from mambactl.files import LINEAGE
from mambactl.foreign import fitted, json_object
from mambactl.json_values import JsonObject
from mambactl.lineage import SCHEMA

_WITHOUT = "fetch it again; without its mambactl.json a folder is a checkpoint of unknown origin"


class _Record(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", frozen=True, defer_build=True)


class _Parent(_Record):
    path: str | None = None
    sha256: str | None = None


class _Selection(_Record):
    ranking: list[int | str] | None = None


class _Metrics(_Record):
    selection: _Selection = _Selection()


class _Stage(_Record):
    stage: str
    created: str | None = None
    source: str | None = None
    teacher: str | None = None
    parent: _Parent = _Parent()
    recipe: JsonObject = {}
    seed: int | None = None
    metrics: _Metrics = _Metrics()


class _Lineage(_Stage):
    versions: dict[str, str] = {}
    ancestors: list[_Stage] = []


def checked_lineage(text: str | bytes, where: Path) -> JsonObject:
    """The lineage in a text of the checkpoint `where`; ModelError for one that says nonsense."""
    record = json_object(text, where, LINEAGE, hint=_WITHOUT)
    schema = record.get("schema")
    if isinstance(schema, int) and schema > SCHEMA:
        raise ModelError(
            f"{where}: {LINEAGE} has schema {schema}, written by a newer mambactl",
            "pip install -U mambactl",
        )
    if schema != SCHEMA or isinstance(schema, bool):
        raise ModelError(f"{where}: {LINEAGE} has the unknown schema {schema!r}", _WITHOUT)
    fitted(_Lineage, record, where, LINEAGE, hint=_WITHOUT)
    return record
