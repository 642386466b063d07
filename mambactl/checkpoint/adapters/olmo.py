"""OLMo 2 (arXiv 2501.00656): norms behind attention and MLP, and on all heads together."""

from transformers import Olmo2Config

from mambactl.checkpoint.adapted import Adapted, build_config
from mambactl.checkpoint.adapters.llama import all_attention, own_tokens
from mambactl.checkpoint.reader import Reader


def adapt(reader: Reader) -> Adapted:
    """All-attention config; tensors have the family's names."""
    native = build_config(reader, Olmo2Config, reader.config)
    form = {"qk_norm": "all", "post_norm": True, "mlp_bias": False, "sliding_window": None}
    return all_attention(reader, native, **form, **own_tokens(native))
