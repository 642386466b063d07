"""Qwen2 and Qwen3: Llamas but for biases or norms between their projections and their heads.

Qwen2 (arXiv 2407.10671) has biases on queries, keys and values, Qwen3 (arXiv 2505.09388) a norm on
every head of queries and keys.
"""

from transformers import PretrainedConfig, Qwen2Config, Qwen3Config

from mambactl.checkpoint.adapted import Adapted, build_config
from mambactl.checkpoint.adapters.llama import all_attention, own_tokens, window_of
from mambactl.checkpoint.reader import Reader


def adapt_qwen2(reader: Reader) -> Adapted:
    """All-attention config; `attention_bias` in a file means nothing to this family."""
    return _adapt(reader, Qwen2Config, attention_bias=["q", "k", "v"])


def adapt_qwen3(reader: Reader) -> Adapted:
    """All-attention config with norms on heads."""
    return _adapt(reader, Qwen3Config, qk_norm=True)


def _adapt(reader: Reader, family: type[PretrainedConfig], **own: object) -> Adapted:
    native = build_config(reader, family, reader.config)
    window = window_of(reader, native)
    return all_attention(reader, native, sliding_window=window, **own_tokens(native), **own)
