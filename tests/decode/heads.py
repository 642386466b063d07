"""Targets whose next token follows mostly from the present one, and draft heads that know so."""

import torch

from mambactl.decode.head_files import new_head
from mambactl.models.draft_head import DraftHead, layer_config
from mambactl.models.hybrid import HybridForCausalLM


def guided(target: HybridForCausalLM, seed: int = 0) -> HybridForCausalLM:
    """The target itself, with the embedding of each token as the output's row of another."""
    g = torch.Generator().manual_seed(seed)
    table = target.model.embed_tokens.weight
    with torch.no_grad():
        order = torch.randperm(len(table), generator=g).to(table.device)
        target.lm_head.weight[order] = 2 * table
    return target


def head_for(
    target: HybridForCausalLM, tokens: int | None = None, noise: float = 0.3, seed: int = 5
) -> DraftHead:
    """A head for every token, or the last `tokens`, that passes embeddings on, and adds noise."""
    config = layer_config(target.config, target.config.num_hidden_layers - 1)
    vocabulary = target.config.vocab_size
    ids = torch.arange(vocabulary)[-(tokens or vocabulary) :].flip(0)
    head = new_head(target, config, ids)
    g = torch.Generator().manual_seed(seed)
    width = config.hidden_size
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            if parameter.ndim == 1:
                parameter.fill_(1)
            elif not name.startswith(("body.lm_head", "body.model.embed_tokens")):
                drawn = torch.randn(parameter.shape, generator=g) * parameter.shape[-1] ** -0.5
                parameter.copy_(noise * drawn)
        head.fc.weight[:, width:] += torch.eye(width, device=target.device, dtype=target.dtype)
    return head.requires_grad_(False).eval()
