"""Draft heads as checkpoints: the fields of their config.json, and how they are recognised."""

import math
from pathlib import Path

from mambactl.checkpoint.config_fields import Fields, read_fields
from mambactl.checkpoint.opening import open_checkpoint
from mambactl.checkpoint.reader import Reader
from mambactl.errors import ModelError
from mambactl.files import Source
from mambactl.json_values import AnyObject, JsonObject

# `model_type` of a draft head, in which other programs and commands see no model
HEAD_TYPE, HEAD_CLASS = "mambactl_draft_head", "DraftHead"
# what a head of its own, and not rows of the target's, is stored as
OUTPUT, IDS = "body.lm_head.weight", "ids"


class HeadFields(Fields):
    """Fields of a draft head beside those of its layer: name and digest of its target."""

    target: str = ""
    target_sha256: str


def is_draft_head(spec: str | Source) -> bool:
    """Return whether a checkpoint is a draft head; ModelError for one that cannot be opened."""
    with open_checkpoint(spec) as reader:
        return is_head(reader)


def is_head(reader: Reader) -> bool:
    """Return whether an open checkpoint is a draft head."""
    return reader.config.get("model_type") == HEAD_TYPE


def require_model(config: AnyObject, path: Path) -> None:
    """Raise ModelError where a config.json is that of a draft head."""
    if config.get("model_type") == HEAD_TYPE:
        raise ModelError(
            f"{path} is a draft head, which is no model of its own",
            "give it to spec-decode, generate, chat or serve as --draft, beside its target",
        )


def head_fields(reader: Reader) -> HeadFields:
    """Target of an open draft head; ModelError where it names none."""
    return read_fields(HeadFields, reader.config, reader.path)


def describe_head(spec: str) -> JsonObject:
    """Path of a draft head, its parameters and its target, by its header."""
    with open_checkpoint(spec) as reader:
        stored = [name for name in reader.names() if name != IDS]
        return {
            "checkpoint": str(reader.path.absolute()),
            "parameters": sum(math.prod(reader.shape(name)) for name in stored),
            "target": head_fields(reader).target,
        }
