"""Comparison of two checkpoints' vocabularies: the same tokens by the same numbers."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch import nn

from mambactl.checkpoint.load import (
    GENERATION,
    adapt,
    load_tokenizer,
    needs_remote_code,
    open_checkpoint,
)
from mambactl.errors import ModelError
from mambactl.foreign import json_object
from mambactl.models.config import HybridConfig
from mambactl.models.hybrid import HybridForCausalLM

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def model_config(spec: str) -> HybridConfig:
    """A checkpoint's configuration, without its weights."""
    with open_checkpoint(spec) as reader:
        return adapt(reader).config


def end_tokens(*ids: int | Sequence[int] | None) -> tuple[int, ...]:
    """Every id that ends a text, of what several configurations name as theirs."""
    found: set[int] = set()
    for each in ids:
        found.update([] if each is None else [each] if isinstance(each, int) else each)
    return tuple(sorted(found))


def token_id(found: object) -> int | None:
    """The id of a special token as tokenizers and configurations keep it, None for none.

    Of several, as for the end of a text, the first counts.
    """
    if isinstance(found, list):
        return token_id(found[0]) if found else None
    return found if isinstance(found, int) else None


def stored_end_tokens(spec: str, tokenizer: "PreTrainedTokenizerBase") -> tuple[int, ...]:
    """The ids that end a text of a checkpoint, without its weights."""
    with open_checkpoint(spec) as reader:
        config, text = adapt(reader).config, reader.files.get(GENERATION)
        generation = {} if text is None else json_object(text, reader.path, GENERATION)
    own = generation.get("eos_token_id")
    return end_tokens(own, config.eos_token_id, token_id(tokenizer.eos_token_id))


def beyond_embedding(
    ids: Sequence[int] | np.ndarray, rows: int, tokenizer: "PreTrainedTokenizerBase"
) -> str | None:
    """A sentence about tokens beyond the `rows` of an embedding; None where all are in it."""
    largest = int(np.max(ids)) if len(ids) else 0
    if largest < rows:
        return None
    token = tokenizer.convert_ids_to_tokens(largest)
    return f"the tokenizer gives the token {largest} ({token}), the model has {rows}"


def vocabulary_size(spec: str, trust_remote_code: bool = False) -> int | None:
    """Number of logits of a checkpoint, from its header; None where its own code decides."""
    with open_checkpoint(spec) as reader:
        if trust_remote_code and needs_remote_code(reader.config, reader.path):
            return reader.config.get("vocab_size")
        return adapt(reader).config.vocab_size


def require_same_tokens(
    source: str,
    other: str,
    role: str,
    hint: str,
    equal_size: bool = True,
    trust_remote_code: bool = False,
    padded: bool = False,
) -> None:
    """Raise ModelError, calling `other` the `role` of `source`, unless they share a vocabulary.

    Every number that both tokenizers define must be the same token; without `equal_size` one
    model may have padding that the other lacks, and where it may be `padded`, `other` alone.
    """
    sizes = [vocabulary_size(spec, trust_remote_code) for spec in (other, source)]
    difference = _difference(source, other, trust_remote_code)
    if difference:
        counts = "" if sizes[0] == sizes[1] else f" ({sizes[0]} and {sizes[1]} tokens)"
        raise ModelError(
            f"the {role} {other} has another vocabulary than {source}: {difference}{counts}", hint
        )
    theirs, ours = sizes
    if theirs is None or ours is None or theirs == ours:
        return
    loose = not equal_size or (padded and theirs > ours)
    if difference is None or not loose:
        raise ModelError(f"the {role} {other} has {theirs} tokens, {source} has {ours}", hint)


def without_padding(model: HybridForCausalLM, size: int) -> HybridForCausalLM:
    """The model with its first `size` tokens alone, whose rows it does not copy."""
    if model.config.vocab_size <= size:
        return model
    head, embedding = model.lm_head, model.model.embed_tokens
    shared = head.weight is embedding.weight
    head.weight = nn.Parameter(head.weight.data[:size], head.weight.requires_grad)
    if shared:
        embedding.weight = head.weight
    else:
        rows = embedding.weight
        embedding.weight = nn.Parameter(rows.data[:size], rows.requires_grad)
    head.out_features = embedding.num_embeddings = size
    model.config.vocab_size = model.vocab_size = size
    if model.config.pad_token_id is not None and model.config.pad_token_id >= size:
        model.config.pad_token_id = embedding.padding_idx = None
    return model


def _difference(source: str, other: str, trust_remote_code: bool) -> str | None:
    """The first token that differs, "" without one, None when there is nothing to compare."""
    try:
        theirs, ours = (
            {
                index: token
                for token, index in load_tokenizer(spec, trust_remote_code).get_vocab().items()
            }
            for spec in (other, source)
        )
    except ModelError:
        # weights alone: the size is all there is to compare
        return None
    shared = sorted(theirs.keys() & ours.keys())
    if not shared:
        return "no number is in both"
    found = (i for i in shared if theirs[i] != ours[i])
    return next((f"token {i} is {theirs[i]!r}, not {ours[i]!r}" for i in found), "")
