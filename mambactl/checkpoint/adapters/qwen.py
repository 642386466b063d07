"""Qwen2 and Qwen3: Llamas but for biases or norms between their projections and their heads.

Qwen2 (arXiv 2407.10671) has biases on queries, keys and values, Qwen3 (arXiv 2505.09388) a norm on
every head of queries and keys.
"""

from typing import Any

from transformers import PretrainedConfig, Qwen2Config, Qwen3Config

from mambactl.checkpoint.adapted import Adapted, build_config
from mambactl.checkpoint.adapters.llama import all_attention
from mambactl.checkpoint.reader import Reader
from mambactl.errors import ModelError


def adapt_qwen2(reader: Reader) -> Adapted:
    """All-attention config; `attention_bias` in a file means nothing to this family."""
    return _adapt(reader, Qwen2Config, attention_bias=["q", "k", "v"])


def adapt_qwen3(reader: Reader) -> Adapted:
    """All-attention config with norms on heads."""
    return _adapt(reader, Qwen3Config, qk_norm=True)


def _adapt(reader: Reader, family: type[PretrainedConfig], **own: Any) -> Adapted:
    native = build_config(reader, family, reader.config)
    windows = set(native.layer_types) - {"full_attention"}
    if windows and len(set(native.layer_types)) > 1:
        raise ModelError(
            f"{reader.path} has a sliding window in some layers only, which is not supported",
            "set use_sliding_window to false in config.json if its texts fit the window",
        )
    # without a token of its own it has none, where Llama has 1 and 2
    tokens = {name: getattr(native, name) for name in ("bos_token_id", "eos_token_id")}
    window = native.sliding_window if windows else None
    return all_attention(reader, native, sliding_window=window, **tokens, **own)
