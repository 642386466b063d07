"""Output head of any language model of transformers, with its type."""

from typing import cast

from torch import nn
from transformers import PreTrainedModel


def output_head(model: PreTrainedModel) -> nn.Linear:
    """The linear map from hidden states to logits."""
    # every language model has one, and some have one that is quantised
    return cast(nn.Linear, model.get_output_embeddings())
