"""SmolLM3: a Llama in which every fourth layer has no rotary positions (NoPE, arXiv 2305.19466)."""

from transformers import SmolLM3Config

from mambactl.checkpoint.adapted import Adapted, build_config
from mambactl.checkpoint.adapters.llama import all_attention, own_tokens, window_of
from mambactl.checkpoint.reader import Reader
from mambactl.errors import ModelError
from mambactl.present import present


def adapt(reader: Reader) -> Adapted:
    """All-attention config that names the layers without rotation."""
    native = build_config(reader, SmolLM3Config, reader.config)
    rotated, layers = present(native.no_rope_layers), native.num_hidden_layers
    if len(rotated) < layers:
        raise ModelError(
            f"{reader.path} has no_rope_layers of {len(rotated)} layers, its config {layers}",
            "fetch it again, or correct config.json",
        )
    without = [index for index in range(layers) if not rotated[index]]
    return all_attention(
        reader,
        native,
        unrotated_layers=without or None,
        sliding_window=window_of(reader, native),
        **own_tokens(native),
    )
