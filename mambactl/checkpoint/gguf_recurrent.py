"""GGUFs of models with recurrent layers, as `export` writes them: granitehybrid, mamba and mamba2.

A Mamba-2 layer there has a row for every head and group, which ours can have as well.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from pydantic import Field

from mambactl.checkpoint.config_fields import Fields, Layers, Number, Positions, Size, Small
from mambactl.json_values import JsonObject

if TYPE_CHECKING:
    from torch import Tensor

ARCHITECTURES = ("granitehybrid", "mamba", "mamba2")
# of tensors in a layer, without their endings
RECURRENT_NAMES = {
    "ssm_in": "mamba.in_proj",
    "ssm_conv1d": "mamba.conv1d",
    "ssm_x": "mamba.x_proj",
    "ssm_dt": "mamba.dt_proj",
    "ssm_norm": "mamba.norm",
    "ssm_out": "mamba.out_proj",
}
_MAX_POSITIONS = 1 << 20


class RecurrentFields(Fields):
    """Sizes of a model with recurrent layers; the keys begin with its architecture."""

    width: Size = Field(alias="embedding_length")
    inner: int = Field(alias="feed_forward_length", ge=0)
    layers: Layers = Field(alias="block_count")
    heads: int = Field(alias="attention.head_count", ge=0)
    shared_heads: list[int] | None = Field(None, alias="attention.head_count_kv")
    head_dim: Size | None = Field(None, alias="attention.key_length")
    context: Positions = Field(alias="context_length")
    epsilon: Small = Field(alias="attention.layer_norm_rms_epsilon")
    rope_base: Number = Field(10000.0, alias="rope.freq_base")
    scaling: str = Field("none", alias="rope.scaling.type")
    factor: Number | None = Field(None, alias="rope.scaling.factor")
    taps: Size = Field(alias="ssm.conv_kernel")
    d_inner: Size = Field(alias="ssm.inner_size")
    d_state: Size = Field(alias="ssm.state_size")
    rank: Size = Field(alias="ssm.time_step_rank")
    groups: Size | None = Field(None, alias="ssm.group_count")


def recurrent_config(about: RecurrentFields, biased: list[str]) -> JsonObject:
    """The fields of our configuration that say what is computed; `biased` of q, k, v, o."""
    hybrid = about.shared_heads is not None
    kind = "mamba1" if about.groups is None else "mamba2"
    shared = [heads or None for heads in about.shared_heads or [0] * about.layers]
    found = {
        "model_type": "mambactl_hybrid",
        "architectures": ["HybridForCausalLM"],
        "hidden_size": about.width,
        "intermediate_size": about.inner or about.width,
        "num_hidden_layers": about.layers,
        "num_attention_heads": about.heads or 1,
        "num_key_value_heads": next(filter(None, shared), about.heads or 1),
        "max_position_embeddings": about.context if hybrid else _MAX_POSITIONS,
        "mixers": ["attention" if heads else kind for heads in shared],
        "has_mlp": bool(about.inner),
        "attention_bias": biased or False,
        kind: _mamba1(about) if about.groups is None else _mamba2(about),
    }
    return found | ({"head_dim": about.head_dim} if about.head_dim else {})


def _mamba1(about: RecurrentFields) -> JsonObject:
    return {
        "d_inner": about.d_inner,
        "dt_rank": about.rank,
        "d_state": about.d_state,
        "d_conv": about.taps,
        "native": True,
    }


def _mamba2(about: RecurrentFields) -> JsonObject:
    return {
        "n_heads": about.rank,
        "head_dim": about.d_inner // about.rank,
        "d_state": about.d_state,
        "x_heads": about.rank,
        "b_groups": about.groups,
        "c_groups": about.groups,
        "norm_groups": about.groups,
        "norm_eps": float(f"{about.epsilon:.5g}"),
        "d_conv": about.taps,
    }


def layer_changes(about: RecurrentFields) -> "Mapping[str, Callable[[Tensor], Tensor]]":
    """Functions from a mixer's tensors as GGUF stores them to ours, by our names."""
    changes: dict[str, Callable[[Tensor], Tensor]] = {
        "conv1d.weight": lambda taps: taps.unsqueeze(1),
        "A_log": lambda decay: (-decay).log(),
    }
    if about.groups is not None:
        # Mamba-2: one number for each head, and a row of the norm for each group
        changes["A_log"] = lambda decay: (-decay).log().flatten()
        changes |= dict.fromkeys(("D", "norm.weight"), lambda rows: rows.flatten())
    return changes
