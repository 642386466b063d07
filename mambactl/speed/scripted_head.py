"""A draft head of random weights whose drafts are accepted as often as asked."""

import torch
from torch import Tensor

from mambactl.decode.head_files import new_head
from mambactl.models.config import HybridConfig
from mambactl.models.draft_head import DraftHead, layer_config
from mambactl.models.hybrid import HybridForCausalLM
from mambactl.speed.shapes import cycle_of, fill

# the tokens that it can draft, at most
TOKENS = 32_000


@torch.no_grad()
def scripted_head(
    target: HybridForCausalLM, successor: Tensor, other: Tensor, seed: int = 0
) -> DraftHead:
    """A head of a scripted target that drafts `other[t]` [V] behind token t of the cycle.

    The target embeds a token as the output's row of its `successor` [V]. The head passes embeddings
    on, at full cost, and each row of its output stands for the token that is drafted by it.
    """
    cycle = cycle_of(successor)  # [n]
    config = layer_config(target.config, target.config.num_hidden_layers - 1)
    head = new_head(target, config, successor[cycle])
    head.ids = other[cycle].to(target.device)
    generator = torch.Generator(target.device).manual_seed(seed)
    for name, parameter in head.named_parameters():
        if not name.startswith(("body.lm_head", "body.model.embed_tokens")):
            # as often as a layer and the product add to the stream
            fill(name, parameter, 3, generator)
    width = config.hidden_size
    head.fc.weight[:, width:] += torch.eye(width, device=target.device, dtype=target.dtype)
    return head.requires_grad_(False).eval()


def config_read(head: DraftHead) -> HybridConfig:
    """Configuration of a model that reads the bytes that a pass of a head does.

    Its one product of two inputs is left out: 2 of about 14 times the squared width.
    """
    return head.config.only(0, vocab_size=len(head.ids))
