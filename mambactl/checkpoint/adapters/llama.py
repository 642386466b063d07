"""Llama and Mistral: a hybrid that has only attention layers, under the same tensor names."""

from transformers import LlamaConfig, MistralConfig, PretrainedConfig

from mambactl.checkpoint.adapted import Adapted, build_config, same_names
from mambactl.checkpoint.reader import Reader
from mambactl.errors import ModelError
from mambactl.json_values import JsonObject
from mambactl.models.config import HybridConfig

# what decides the computation or the text around it; bookkeeping of the source stays behind
_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "rope_parameters",
    "tie_word_embeddings",
    "attention_bias",
    "mlp_bias",
    "sliding_window",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "dtype",
)


def adapt(reader: Reader) -> Adapted:
    """All-attention config; each family's own class fills in what its file leaves out."""
    if reader.config["model_type"] == "mistral":
        return all_attention(reader, build_config(reader, MistralConfig, reader.config))
    native = build_config(reader, LlamaConfig, reader.config)
    return all_attention(reader, native, sliding_window=None)


def own_tokens(native: PretrainedConfig) -> JsonObject:
    """Tokens of a family that has none where its file names none; Llama has 1 and 2."""
    return {name: getattr(native, name) for name in ("bos_token_id", "eos_token_id")}


def window_of(reader: Reader, native: PretrainedConfig) -> int | None:
    """The window of all layers; ModelError where some layers have one and others not."""
    windows = set(native.layer_types) - {"full_attention"}
    if windows and len(set(native.layer_types)) > 1:
        raise ModelError(
            f"{reader.path} has a sliding window in some layers only, which is not supported",
            "set use_sliding_window to false in config.json if its texts fit the window",
        )
    return native.sliding_window if windows else None


def all_attention(reader: Reader, native: PretrainedConfig, **own: object) -> Adapted:
    """A Llama with the fields of `native`; keywords say where its family differs."""
    fields: JsonObject = {
        name: value for name in _FIELDS if (value := getattr(native, name, None)) is not None
    }
    config = build_config(reader, HybridConfig, fields | own)
    return Adapted(config, same_names(reader, config))
