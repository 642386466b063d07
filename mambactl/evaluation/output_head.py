"""The head of any model of transformers, of which its own class says less."""

from typing import cast

from torch import nn
from transformers import PreTrainedModel


def output_head(model: PreTrainedModel) -> nn.Linear:
    """The linear map from hidden states to logits."""
    # every language model has one, and some have one that is quantised
    return cast(nn.Linear, model.get_output_embeddings())
