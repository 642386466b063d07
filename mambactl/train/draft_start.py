"""The first weights of a draft: a head with the target's last attention, a model of some layers."""

from collections.abc import Sequence

import torch
from torch import nn

from mambactl.checkpoint.load import EMBEDDING, HEAD, empty_model
from mambactl.checkpoint.save import stored_dtype
from mambactl.data.pack import Batch
from mambactl.decode.head_files import new_head
from mambactl.models.config import HybridConfig
from mambactl.models.draft_head import DraftHead, layer_config
from mambactl.models.hybrid import HybridForCausalLM
from mambactl.train.predicted_input import input_map

# rms of both inputs of the product: the larger, the further a step of Adam moves what it gives
INPUT_SIZE = 10.0


def spread_layers(whole: int, count: int) -> list[int]:
    """Indices of `count` of `whole` layers at equal distances, the first and the last among them.

    One is the last.
    """
    if count == 1:
        return [whole - 1]
    return [round(number * (whole - 1) / (count - 1)) for number in range(count)]


@torch.no_grad()
def cut_model(target: HybridForCausalLM, layers: list[int]) -> HybridForCausalLM:
    """A model of these layers of the target, in fp32 but for embedding and output, its own copy."""
    config = target.config.cut(layers)
    source = target.state_dict()
    state = {}
    for name in empty_model(config).state_dict():
        parts = name.split(".")
        if parts[:2] == ["model", "layers"]:
            parts[2] = str(layers[int(parts[2])])
        kind = target.dtype if name in (EMBEDDING, HEAD) else stored_dtype(name, torch.float32)
        state[name] = source[".".join(parts)].to(kind, copy=True)
    model = empty_model(config)
    if config.tie_word_embeddings:
        state[HEAD] = state[EMBEDDING]
    model.load_state_dict(state, strict=True, assign=True)
    model.tie_weights()
    return model.to(target.device)


@torch.no_grad()
def begun_head(
    target: HybridForCausalLM,
    ids: torch.Tensor,
    own_output: bool,
    text: Sequence[Batch],
) -> DraftHead:
    """A head for the tokens `ids`, in fp32 where it trains.

    Its layer starts as the target's last layer that is attention alone, or at random where no
    layer is, with the MLP of the last one. The product predicts what that layer reads, as it did
    over `text`; without text it is zero, for weights to be loaded.
    """
    config = target.config
    attention = config.attention_layers
    index = attention[-1] if attention else config.num_hidden_layers - 1
    head = new_head(target, _with_mlp(layer_config(config, index)), ids)
    for module in (head.stream_norm, head.token_norm, head.fc, head.body.model.layers):
        module.float()
    head.body.model.norm.float().load_state_dict(target.model.norm.state_dict())
    for norm in (head.stream_norm, head.token_norm):
        norm.weight.fill_(INPUT_SIZE)
    head.fc.weight.zero_()
    if text:
        layer = index if attention else None
        head.fc.weight.copy_(input_map(target, layer, text) / INPUT_SIZE)
    theirs = target.model.layers[index].state_dict()
    for name, ours in head.body.model.layers[0].state_dict().items():
        found = theirs.get(name)
        if found is not None and found.shape == ours.shape:
            ours.copy_(found)
        elif ours.ndim == 1:
            ours.fill_(0.0 if name.endswith("bias") else 1.0)
        else:
            nn.init.normal_(ours, std=config.initializer_range)
    if own_output:
        output = head.body.lm_head
        output.weight = nn.Parameter(output.weight.detach().float())
    return head


def _with_mlp(config: HybridConfig) -> HybridConfig:
    """The layer with an MLP, also where the target has none."""
    if config.has_mlp:
        return config
    return config.only(0, has_mlp=True, intermediate_size=4 * config.hidden_size)
