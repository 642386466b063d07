"""The architectures of transformers that compute what a model of ours computes.

GraniteMoeHybrid without experts is a Llama some of whose layers are Mamba-2; Mamba and Mamba2 are
the native models; a model without recurrent layers is one of the families that are converted.
vLLM and SGLang read the same folders.
"""

from functools import partial

from torch import Tensor

from mambactl.export.exported_form import (
    Change,
    Form,
    Origin,
    Step,
    Written,
    cannot_hold,
    changed,
    renamed,
)
from mambactl.export.mamba2_layout import mamba2_layout, spreads
from mambactl.export.native_mamba import is_native, native_form, token_fields
from mambactl.models.config import HybridConfig
from mambactl.models.mixers.attention import AttentionSpec
from mambactl.models.positions import rotary_of

GRANITE = "GraniteMoeHybrid"
_FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3", "SmolLM3", "Olmo2", "Granite")
_DENSE = f"mambactl export --to transformers holds {', '.join(_FAMILIES)}"


def transformers_form(origin: Origin) -> Form:
    """The model in the form that fits it; ModelError where none does."""
    config = origin.config
    if not config.replaced_layers:
        return _dense(origin)
    return native_form(origin) if is_native(config) else _granite(origin)


def shared_fields(config: HybridConfig) -> dict[str, object]:
    """Fields that every decoder with attention and MLPs has."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "hidden_act": config.hidden_act,
        "max_position_embeddings": config.max_position_embeddings,
        "initializer_range": config.initializer_range,
        "rms_norm_eps": config.rms_norm_eps,
        "use_cache": True,
        **token_fields(config),
        **_rotary_fields(config),
    }


def _rotary_fields(config: HybridConfig) -> dict[str, object]:
    """The rotation in the spelling of transformers 5, and in that of older ones and of engines."""
    rotary = dict(rotary_of(config))
    kind = rotary.get("rope_type", "default")
    scaling = {key: value for key, value in rotary.items() if key != "rope_theta"}
    return {
        "rope_parameters": rotary,
        "rope_theta": rotary["rope_theta"],
        "rope_scaling": None if kind == "default" else scaling,
    }


# what stays as it is


def _dense(origin: Origin) -> Form:
    config = origin.config
    name, own = _dense_family(origin)
    fields = {
        "architectures": [f"{name}ForCausalLM"],
        "model_type": name.lower(),
        **shared_fields(config),
        **own,
    }
    return Form(f"{name}ForCausalLM", fields, [renamed(each, each) for each in origin.names])


def _dense_family(origin: Origin) -> tuple[str, dict[str, object]]:
    """Name of a family, and the fields that are its own; ModelError where none fits."""
    config = origin.config
    biased, windowed, in_mlp = config.attention_bias, config.sliding_window, config.mlp_bias
    needed = {
        "Olmo2": config.post_norm or config.qk_norm == "all",
        "SmolLM3": bool(config.unrotated_layers),
        "Granite": bool(config.factors),
        "Qwen3": config.qk_norm is True,
        "Qwen2": not isinstance(biased, bool),
    }
    names = [name for name, holds in needed.items() if holds]
    names = names or ["Mistral" if windowed else "Llama"]
    name = names[0]
    every = {"sliding_window": windowed, "use_sliding_window": bool(windowed)}
    # the first layer with a window
    qwen = every | {"max_window_layers": 0 if windowed else config.num_hidden_layers}
    biases = {"attention_bias": biased, "mlp_bias": in_mlp}
    rotated = [int(config.rotated(index)) for index in range(config.num_hidden_layers)]
    fields = {
        "Olmo2": {"attention_bias": biased},
        "SmolLM3": biases | every | {"no_rope_layers": rotated},
        "Granite": biases | factor_fields(config),
        "Qwen3": qwen | {"attention_bias": biased},
        "Qwen2": qwen,
        "Llama": biases,
        "Mistral": {"sliding_window": windowed},
    }
    refused = {
        f"has what {' and '.join(names)} have": len(names) > 1,
        "has norms in other places": name == "Olmo2"
        and not (config.post_norm and config.qk_norm == "all"),
        f"has biases on {biased}": name == "Qwen2"
        and not isinstance(biased, bool)
        and set(biased) != set("qkv"),
        "has biases": name == "Mistral" and biased,
        "has biases in its MLPs": in_mlp and "mlp_bias" not in fields[name],
        "has a sliding window": windowed and "sliding_window" not in fields[name],
        "has a window in layers without rotation": name == "SmolLM3" and windowed,
    }
    for what, holds in refused.items():
        if holds:
            raise cannot_hold(origin, what, name, _DENSE)
    return name, fields[name]


def factor_fields(config: HybridConfig) -> dict[str, float]:
    """The factors of a Granite."""
    scores = config.attention_multiplier
    return {
        "attention_multiplier": config.head_dim**-0.5 if scores is None else scores,
        "embedding_multiplier": config.embedding_multiplier,
        "logits_scaling": config.logits_scaling,
        "residual_multiplier": config.residual_multiplier,
    }


# GraniteMoeHybrid


def _granite(origin: Origin) -> Form:
    config = origin.config
    require_plain_blocks(origin, GRANITE, factors=True)
    layout = mamba2_layout(origin, GRANITE)
    s = layout.sizes
    if s.d_inner % config.hidden_size:
        found = f"has mixers of width {s.d_inner} in a model of width {config.hidden_size}"
        raise cannot_hold(origin, found, GRANITE)
    attention = config.attention_layers
    require_attention(origin, GRANITE)
    fields = {
        "architectures": [f"{GRANITE}ForCausalLM"],
        "model_type": GRANITE.lower(),
        **shared_fields(config),
        # names that every version and engine knows
        "layer_types": [
            "attention" if i in attention else "mamba" for i in range(len(config.mixers))
        ],
        "position_embedding_type": "rope" if config.rotated(attention[0]) else "nope",
        "attention_bias": bool(config.attention_bias),
        **factor_fields(config),
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
        "shared_intermediate_size": config.intermediate_size,
        "mamba_n_heads": s.n_heads,
        "mamba_d_head": s.head_dim,
        "mamba_n_groups": layout.groups,
        "mamba_d_state": s.d_state,
        "mamba_d_conv": s.d_conv,
        "mamba_expand": s.d_inner // config.hidden_size,
        "mamba_chunk_size": s.chunk_size,
        "mamba_conv_bias": s.conv_bias,
        "mamba_proj_bias": s.proj_bias,
    }
    steps = _granite_steps(origin, spreads(layout))
    return Form(f"{GRANITE}ForCausalLM", fields, steps, since=layout.since)


def require_plain_blocks(origin: Origin, form: str, factors: bool = False) -> None:
    """Raise ModelError for what no model around the mixers may have.

    With `factors` the form has those of a Granite, and can do without rotation altogether.
    """
    config = origin.config
    attention = config.attention_layers
    rotated = {config.rotated(index) for index in attention}
    window = config.sliding_window
    refused = {
        "has layers without MLP": not config.has_mlp,
        "has norms on heads": config.qk_norm,
        "has norms behind its mixers": config.post_norm,
        "has layers without rotary positions": len(rotated) > 1
        or (not factors and False in rotated),
        f"has {' and '.join(config.factors)}": bool(config.factors) and not factors,
        "has biases in its MLPs": config.mlp_bias,
        f"has the activation {config.hidden_act}": config.hidden_act != "silu",
        f"has a sliding window of {window}": bool(window and attention),
    }
    for what, found in refused.items():
        if found:
            raise cannot_hold(origin, what, form, "nothing in `convert` changes that")


def require_attention(origin: Origin, form: str) -> None:
    """Raise ModelError for a model of recurrent layers alone.

    transformers and llama.cpp both fail on one: they ask for the length of, or the memory for, keys
    and values that no layer has.
    """
    if not origin.config.attention_layers:
        hint = "keep one (`convert --keep-attention 0`), or use `--to mambainllama`"
        raise cannot_hold(origin, "has no attention layer", form, hint)


def _granite_steps(origin: Origin, spread: dict[str, Change]) -> list[Step]:
    steps = []
    for name in origin.names:
        stem, _, part = name.rpartition("mlp.")
        mixer = name.partition(".mamba.")[2]
        if part == "gate_proj.weight":
            fused = f"{stem}shared_mlp.input_linear.weight"
            steps.append(Step((name, f"{stem}mlp.up_proj.weight"), partial(_joined, fused)))
        elif part == "down_proj.weight":
            steps.append(renamed(name, f"{stem}shared_mlp.output_linear.weight"))
        elif mixer in spread:
            steps.append(changed(name, name, spread[mixer]))
        elif part != "up_proj.weight":
            steps.append(Step((name,), partial(_with_bias, name, origin.config)))
    return steps


def _joined(name: str, *tensors: Tensor) -> dict[str, Written]:
    return {name: tensors}


def _with_bias(name: str, config: HybridConfig, tensor: Tensor) -> dict[str, Tensor]:
    """A tensor, and zeros where only others of an attention's projections have a bias."""
    projection = name.partition(f".{AttentionSpec.attribute}.")[2]
    biased = config.attention_bias
    if isinstance(biased, bool) or not projection.endswith("_proj.weight") or not biased:
        return {name: tensor}
    if projection[0] in biased:
        return {name: tensor}
    return {name: tensor, f"{name.removesuffix('weight')}bias": tensor.new_zeros(tensor.shape[0])}
