"""Names that transformers changed within the range of versions that pyproject.toml allows."""

from dataclasses import fields
from typing import TYPE_CHECKING, TypeVar

from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast

Held = TypeVar("Held", bound=Cache)
OLD_CACHE, NEW_CACHE = "past_key_values", "cache"
# of the cache among inputs and outputs: the new one from 5.24 on
CACHE = NEW_CACHE if NEW_CACHE in {f.name for f in fields(BaseModelOutputWithPast)} else OLD_CACHE
# of the option of trainers and the method of models that recompute activations: new from 5.23 on
CHECKPOINTING = next(
    name
    for name in ("activation_checkpointing", "gradient_checkpointing")
    if hasattr(PreTrainedModel, f"{name}_enable")
)

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def one_cache(old: Held | None, new: Held | None) -> Held | None:
    """The cache that a caller gave by either name; ValueError for both."""
    if old is not None and new is not None:
        raise ValueError(f"{OLD_CACHE} and {NEW_CACHE} are two names of one input: give one")
    return old if new is None else new


def recompute_activations(model: PreTrainedModel, options: dict[str, object] | None = None) -> None:
    """Keep a block's input alone until the backward pass; `options` are those of torch."""
    getattr(model, f"{CHECKPOINTING}_enable")(options)


def gguf_tokenizer(architecture: str, described: dict[str, object]) -> "Tokenizer":
    """The tokenizer that the metadata of a GGUF describe."""
    try:
        from transformers.integrations.gguf.gguf_tokenizer_mapping import convert_gguf_tokenizer
    except ModuleNotFoundError:
        # before 5.18
        from transformers.integrations.ggml import (
            convert_gguf_tokenizer,  # pyright: ignore[reportAttributeAccessIssue]
        )
    return convert_gguf_tokenizer(architecture, described)[0]
