"""Granite without experts: a Llama whose embeddings, scores, sums and logits have factors."""

from transformers import GraniteConfig

from mambactl.checkpoint.adapted import Adapted, build_config
from mambactl.checkpoint.adapters.llama import all_attention
from mambactl.checkpoint.reader import Reader
from mambactl.models.config import MULTIPLIERS


def adapt(reader: Reader) -> Adapted:
    """All-attention config with the factors of the file, or the family's where it names none."""
    native = build_config(reader, GraniteConfig, reader.config)
    factors = {name: getattr(native, name) for name in MULTIPLIERS}
    return all_attention(reader, native, sliding_window=None, **factors)
