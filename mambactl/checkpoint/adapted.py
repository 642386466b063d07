"""A checkpoint as this project's model: its configuration, names and checked numbers."""

import copy
import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TypeVar

import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from torch import Tensor
from transformers import PretrainedConfig

from mambactl.checkpoint.config_fields import DecoderFields, read_fields
from mambactl.checkpoint.reader import Reader
from mambactl.errors import ModelError
from mambactl.files import CONFIG
from mambactl.foreign import blamed
from mambactl.json_values import AnyObject
from mambactl.models.config import HybridConfig
from mambactl.models.mixers.registry import MIXERS

Config = TypeVar("Config", bound=PretrainedConfig)


@dataclass(frozen=True)
class Adapted:
    """Our configuration for a checkpoint; `names` maps our tensor names to those in the source."""

    config: HybridConfig
    names: dict[str, str]

    def get(self, reader: Reader, name: str) -> Tensor:
        """Read one tensor by our name; raises ModelError where a number in it is not finite."""
        tensor = reader.get(self.names[name])
        require_finite(reader.path, self.names[name], tensor)
        return tensor


def require_finite(path: Path, name: str, tensor: Tensor) -> None:
    """Raise ModelError where a number in a tensor of a checkpoint is not finite."""
    if not finite(tensor):
        raise ModelError(
            f"{path}: {name} holds NaN or infinite numbers",
            "the checkpoint is damaged, or its training diverged: give another one",
        )


def finite(tensor: Tensor) -> bool:
    """True if all values are finite: one pass, without a copy if they are."""
    # a sum of finite numbers may overflow, but a sum with others is never finite
    return math.isfinite(tensor.sum()) or bool(torch.isfinite(tensor).all())


def in_dtype(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in another type; raises ModelError where a weight is too large for that."""
    result = tensor.to(dtype)
    # bfloat16 ends where float32 does, but for rounding
    narrower = 2 * torch.finfo(dtype).max < torch.finfo(tensor.dtype).max
    if narrower and not finite(result):
        kind = str(dtype).removeprefix("torch.")
        raise ModelError(f"{name} holds numbers too large for {kind}", "use --dtype bfloat16")
    return result


# keys that are no field of a family, and what its class makes fields of
_OLDER_KEYS = {"torch_dtype", "rope_theta", "rope_scaling", "partial_rotary_factor"}
# read by the attention of every family, also of those that do not declare it
_UNDECLARED = {"head_dim"}
# of every family in transformers, the fields that decide something for ours
_SHARED_FIELDS = {"architectures", "dtype", "transformers_version"}


def build_config(reader: Reader, family: type[Config], values: AnyObject) -> Config:
    """Build a configuration from checked values; ModelError where they contradict each other.

    Other keys stay behind: the library would make attributes of them, or choose code by them.
    """
    read_fields(DecoderFields, values, reader.path)
    unused = {field.name for field in fields(PretrainedConfig)} - _SHARED_FIELDS
    sections = {name for spec in MIXERS.values() for name in spec.sections}
    known = {field.name for field in fields(family)} - unused | _OLDER_KEYS | _UNDECLARED | sections
    # the library fills in what nested values leave out
    own = copy.deepcopy({key: value for key, value in values.items() if key in known})
    with blamed(reader.path, CONFIG, hint=f"fetch it again, or correct {CONFIG}"):
        try:
            return family.from_dict(own)
        except StrictDataclassClassValidationError as error:
            # what it wraps says what is wrong
            raise error.__cause__ or error from error


def same_names(reader: Reader, config: HybridConfig) -> dict[str, str]:
    """Identity, without what a checkpoint may repeat: rotary tables and a tied head."""
    tied = config.tie_word_embeddings
    return {
        name: name
        for name in reader.names()
        if not name.endswith("rotary_emb.inv_freq") and not (tied and name == "lm_head.weight")
    }
