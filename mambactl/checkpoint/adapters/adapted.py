"""What an adapter hands back: a configuration and where each of our tensors comes from."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import PretrainedConfig

from mambactl.checkpoint.reader import Reader
from mambactl.errors import ModelError
from mambactl.models.config import HybridConfig

Config = TypeVar("Config", bound=PretrainedConfig)


@dataclass(frozen=True)
class Adapted:
    """`names` maps our tensor names to those in the source."""

    config: HybridConfig
    names: dict[str, str]

    def get(self, reader: Reader, name: str) -> Tensor:
        """Read one tensor by our name."""
        return reader.get(self.names[name])


def build_config(reader: Reader, family: type[Config], fields: Mapping[str, Any]) -> Config:
    """Build a configuration, turning a contradiction in it into a ModelError."""
    try:
        return family.from_dict(dict(fields))
    except (ValueError, TypeError, KeyError, StrictDataclassError) as error:
        raise ModelError(
            f"the config of {reader.path} is not usable: {str(error).strip()}",
            "fetch the checkpoint again, or correct config.json",
        ) from error


def same_names(reader: Reader, config: HybridConfig) -> dict[str, str]:
    """Identity, without what a checkpoint may repeat: rotary tables and a tied head."""
    tied = config.tie_word_embeddings
    return {
        name: name
        for name in reader.names()
        if not name.endswith("rotary_emb.inv_freq") and not (tied and name == "lm_head.weight")
    }
