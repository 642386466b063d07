"""A tokenizer as the keys of a GGUF: vocabulary, merges, how text is cut, and the chat template."""

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING

from mambactl import console
from mambactl.checkpoint.gguf_writer import Value
from mambactl.checkpoint.load import load_tokenizer
from mambactl.errors import ModelError
from mambactl.export.exported_form import Origin, cannot_hold
from mambactl.json_values import AnyObject

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# kinds of tokens in llama.cpp
_NORMAL, _UNKNOWN, _SPECIAL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
_BEGIN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_END = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# how a tokenizer cuts text before it merges bytes -> what llama.cpp calls that
_CUTS = {
    (("ByteLevel", True),): "gpt-2",
    (("Digits", True), ("ByteLevel", True)): "smollm",
    (("Split", _BEGIN + r"\p{N}{1,3}" + _END), ("ByteLevel", False)): "llama-bpe",
    (("Split", _BEGIN + r"\p{N}" + _END), ("ByteLevel", False)): "qwen2",
}
# the field of each part that decides how it cuts
_DECISIVE = {"ByteLevel": "use_regex", "Digits": "individual_digits", "Split": "pattern"}
_ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}


def vocabulary_metadata(origin: Origin) -> dict[str, Value]:
    """Keys of the tokenizer; a model without one has none, which is a warning.

    Raises ModelError for a tokenizer that llama.cpp has no name for.
    """
    try:
        tokenizer = load_tokenizer(origin.spec)
    except ModelError as error:
        console.warn(f"{error}: the GGUF has none, and takes token ids alone")
        return {"tokenizer.ggml.model": "none"}
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    model = described["model"]
    if model["type"] != "BPE":
        raise _nameless(origin, f"has a tokenizer of the kind {model['type']}")
    kinds = _token_types(tokenizer, origin.config.vocab_size, origin)
    if model.get("byte_fallback"):
        own = _sentencepiece(described, kinds, tokenizer)
    else:
        own = _byte_level(origin, described)
    found: dict[str, Value] = {
        **own,
        "tokenizer.ggml.tokens": [token for token, _ in kinds],
        "tokenizer.ggml.token_type": [kind for _, kind in kinds],
    }
    for role, name in _ROLES.items():
        if (index := getattr(tokenizer, f"{role}_token_id")) is not None:
            found[f"tokenizer.ggml.{name}_token_id"] = index
    begins = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    found["tokenizer.ggml.add_bos_token"] = begins
    if template := _template(tokenizer):
        found["tokenizer.chat_template"] = template
    return found


def _token_types(
    tokenizer: "PreTrainedTokenizerFast", size: int, origin: Origin
) -> list[tuple[str, int]]:
    """Text and kind of every token of the model, whose vocabulary may be larger."""
    found = [(f"[PAD{index}]", _UNUSED) for index in range(size)]
    for token, index in tokenizer.get_vocab().items():
        if index >= size:
            raise cannot_hold(
                origin, f"has {size} embeddings but the token {index}", "a GGUF", None
            )
        found[index] = token, _NORMAL
    for index, token in tokenizer.added_tokens_decoder.items():
        found[index] = token.content, _SPECIAL if token.special else _USER_DEFINED
    return found


def _byte_level(origin: Origin, described: AnyObject) -> dict[str, Value]:
    """Keys of a tokenizer that merges bytes, as GPT-2's does."""
    pre = described["pre_tokenizer"] or {}
    parts = pre.get("pretokenizers", [pre])
    cut = tuple((part.get("type"), _decisive(part)) for part in parts)
    if cut not in _CUTS:
        known = ", ".join(_CUTS.values())
        raise _nameless(origin, "cuts text in a way", f"llama.cpp's {known} are known")
    merges = described["model"]["merges"]
    pairs = [each if isinstance(each, str) else " ".join(each) for each in merges]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": _CUTS[cut],
        "tokenizer.ggml.merges": pairs,
    }


def _decisive(part: AnyObject) -> str | bool | None:
    value = part.get(_DECISIVE.get(str(part.get("type")), ""))
    value = value.get("Regex") if isinstance(value, Mapping) else value
    return value if isinstance(value, str | bool) else None


def _sentencepiece(
    described: AnyObject,
    kinds: list[tuple[str, int]],
    tokenizer: "PreTrainedTokenizerFast",
) -> dict[str, Value]:
    """Keys of a tokenizer that merges characters and falls back to bytes, as Llama 2's does.

    Merges there go by scores; the ids are in the order in which the merges were learned.
    """
    for index, (token, kind) in enumerate(kinds):
        if token.startswith("<0x") and token.endswith(">") and len(token) == len("<0x00>"):
            kinds[index] = token, _BYTE
        elif index == tokenizer.unk_token_id and kind != _UNUSED:
            kinds[index] = token, _UNKNOWN
    spaces = json.dumps([described["normalizer"], described["pre_tokenizer"]])
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.scores": [
            -float(index) if kind == _NORMAL else 0.0 for index, (_, kind) in enumerate(kinds)
        ],
        "tokenizer.ggml.add_space_prefix": '"Prepend"' in spaces or '"first"' in spaces,
    }


def _template(tokenizer: "PreTrainedTokenizerFast") -> str | None:
    found = tokenizer.chat_template
    return found.get("default") if isinstance(found, Mapping) else found


def _nameless(origin: Origin, what: str, known: str = "tokenizers of byte pairs") -> ModelError:
    return cannot_hold(origin, what, "a GGUF", known)
