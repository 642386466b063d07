"""Read a MambaInLlama checkpoint into our model: the equations of its code in terms of ours.

Its Mamba-1 adds the bias of dt twice, and shares x and B among groups of 16 channels.
"""

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from mambactl.checkpoint.load import EMBEDDING, HEAD, empty_model, open_checkpoint
from mambactl.files import Source
from mambactl.models.config import HybridConfig
from mambactl.models.hybrid import HybridForCausalLM
from mambactl.models.mixers.settings import Mamba1Settings, Mamba2Settings

GROUP = 16
# the projections that a Mamba-1 mixer has tensors for, in the order of their rows when joined
PARTS = ("in_proj_z", "in_proj_x", "B_proj", "C_proj", "dt_proj_down")


def load_released(path: Path, config: HybridConfig) -> HybridForCausalLM:
    """The model of a folder in fp32, given the sizes that `config` says."""
    with open_checkpoint(Source(str(path), path, "folder")) as reader:
        found = {name: reader.get(name).float() for name in reader.names()}
    settings = config.layer(config.replaced_layers[0]).settings
    if isinstance(settings, Mamba2Settings):
        config = _with(config, replace(settings, proj_bias=False))
        state = found
    else:
        config = _with(config, replace(settings, proj_bias=False, repeat_width=GROUP))
        state = _mamba1(found)
    state = _separate(state, config)
    if config.tie_word_embeddings:
        state[HEAD] = state[EMBEDDING]
    model = empty_model(config)
    model.load_state_dict(state, strict=True, assign=True)
    model.tie_weights()
    return model.eval()


def _with(config: HybridConfig, settings: Mamba1Settings | Mamba2Settings) -> HybridConfig:
    spec = config.layer(config.replaced_layers[0]).spec
    return config.with_mixers(config.mixers, **{spec.name: asdict(settings)})


def _mamba1(found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    state = {}
    for name, tensor in found.items():
        stem, _, part = name.rpartition(".mamba.")
        if part == f"{PARTS[0]}.weight":
            parts = [found[f"{stem}.mamba.{each}.weight"] for each in PARTS]
            state[f"{stem}.mamba.in_proj.weight"] = torch.cat(parts)
        elif part == "dt_proj.bias":
            state[name] = 2 * tensor
        elif part.removesuffix(".weight") not in PARTS:
            state[name] = tensor
    return state


def _separate(found: Mapping[str, Tensor], config: HybridConfig) -> dict[str, Tensor]:
    """Projections of attention of their own, where they are joined."""
    shared = config.num_key_value_heads * config.head_dim
    rows = [config.num_attention_heads * config.head_dim, shared, shared]
    state = {}
    for name, tensor in found.items():
        if ".mha.in_proj" in name:
            for letter, part in zip("qkv", tensor.split(rows), strict=True):
                state[name.replace("mha.in_proj", f"self_attn.{letter}_proj")] = part
        else:
            state[name.replace("mha.out_proj", "self_attn.o_proj")] = tensor
    return state
