"""The architectures of llama.cpp that compute what a model of ours computes, as GGUF.

granitehybrid is a Llama some of whose layers are Mamba-2; mamba and mamba2 are the native models; a
model without recurrent layers is a llama. Tensors and keys are those that llama.cpp's loader asks
for; a mamba layer there has no biases on its projections.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from torch import Tensor

from mambactl.checkpoint.gguf_writer import Value
from mambactl.export.exported_form import Change, Form, Origin, Step, cannot_hold, changed, renamed
from mambactl.export.gguf_rotary import rotary_metadata, rotary_steps
from mambactl.export.gguf_vocabulary import vocabulary_metadata
from mambactl.export.mamba2_layout import Mamba2Layout, mamba2_layout, spreads
from mambactl.export.native_mamba import is_native, native_model
from mambactl.export.projection_biases import dt_bias_step, is_projection_bias, require_foldable
from mambactl.export.to_transformers import require_attention, require_plain_blocks
from mambactl.models.config import HybridConfig
from mambactl.models.mixers.settings import Mamba1Settings, Mamba2Settings
from mambactl.present import of_kind

# llama.cpp asks for a context, which a model without positions has not
_ANY_CONTEXT = 1 << 20
_OUTER = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_LAYER = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mamba.in_proj": "ssm_in",
    "mamba.conv1d": "ssm_conv1d",
    "mamba.x_proj": "ssm_x",
    "mamba.dt_proj": "ssm_dt",
    "mamba.norm": "ssm_norm",
    "mamba.out_proj": "ssm_out",
}
# tensors whose names there have no ending of their own
_WHOLE = {"mamba.A_log": "ssm_a", "mamba.D": "ssm_d", "mamba.dt_bias": "ssm_dt.bias"}

Changes = dict[str, Change]


def gguf_form(origin: Origin) -> Form:
    """The model in the form that fits it; ModelError where none does."""
    config = origin.config
    if is_native(config):
        name, fields, changes = _native(origin)
    elif config.replaced_layers:
        name, fields, changes = _granite(origin)
    else:
        name, fields, changes = _llama(origin)
    metadata: dict[str, Value] = {
        "general.name": origin.reader.path.stem,
        **{f"{name}.{key}": value for key, value in _common(config).items()},
        **{f"{name}.{key}": value for key, value in fields.items()},
        **vocabulary_metadata(origin),
    }
    steps = list(_steps(origin, changes))
    if config.attention_layers:
        steps += rotary_steps(config)
    return Form(name, metadata, steps)


def gguf_name(name: str) -> str:
    """Our name of a tensor, as llama.cpp spells it."""
    if name in _OUTER:
        return _OUTER[name]
    index, _, rest = name.removeprefix("model.layers.").partition(".")
    if rest in _WHOLE:
        return f"blk.{index}.{_WHOLE[rest]}"
    stem, _, kind = rest.rpartition(".")
    return f"blk.{index}.{_LAYER[stem]}.{kind}"


def _common(config: HybridConfig) -> dict[str, Value]:
    bounded = config.attends
    return {
        "vocab_size": config.vocab_size,
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings if bounded else _ANY_CONTEXT,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size if config.has_mlp else 0,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
    }


def _attention(origin: Origin, form: str) -> tuple[dict[str, Value], Changes]:
    """Metadata and changes of attention layers: pairs of rotated channels lie side by side."""
    config = origin.config
    fields: dict[str, Value] = {
        "attention.head_count": config.num_attention_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "rope.dimension_count": config.head_dim,
        **rotary_metadata(origin, form),
    }
    changes: Changes = {
        f"self_attn.{name}_proj.{kind}": partial(_interleaved, heads)
        for name, heads in (("q", config.num_attention_heads), ("k", config.num_key_value_heads))
        for kind in ("weight", "bias")
    }
    return fields, changes


def _interleaved(heads: int, rows: Tensor) -> Tensor:
    """Rows [H P, ...] in which channel i of a head is followed by channel i + P / 2."""
    halves = rows.unflatten(0, (heads, 2, -1))  # [H, 2, P / 2, ...]
    return halves.transpose(1, 2).flatten(0, 2).contiguous()


def _llama(origin: Origin) -> tuple[str, dict[str, Value], Changes]:
    config, form = origin.config, "llama"
    require_plain_blocks(origin, form)
    if not isinstance(config.attention_bias, bool):
        raise cannot_hold(origin, f"has biases on {config.attention_bias}", form, None)
    fields, changes = _attention(origin, form)
    return form, fields | {"attention.head_count_kv": config.num_key_value_heads}, changes


def _granite(origin: Origin) -> tuple[str, dict[str, Value], Changes]:
    config, form = origin.config, "granitehybrid"
    require_plain_blocks(origin, form)
    require_attention(origin, form)
    layout = _twice_as_wide(origin, mamba2_layout(origin, form))
    fields, changes = _attention(origin, form)
    # a layer without KV heads is recurrent
    heads = [
        config.num_key_value_heads if layer.spec.is_attention else 0 for layer in config.layers
    ]
    fields |= {
        "attention.head_count_kv": heads,
        # whether attention rotates at all
        "rope.scaling.finetuned": True,
        **_mamba2_fields(layout),
    }
    return form, fields, changes | _mamba2_changes(layout)


def _twice_as_wide(origin: Origin, layout: Mamba2Layout) -> Mamba2Layout:
    """Copies of channels until mixers have twice the model's width, as the loader asks."""
    wanted, found = 2 * origin.config.hidden_size, layout.sizes.d_inner
    if wanted % found:
        what = f"has mixers of width {found} in a model of width {origin.config.hidden_size}"
        raise cannot_hold(origin, what, "granitehybrid", None)
    return replace(layout, copies=wanted // found)


def _native(origin: Origin) -> tuple[str, dict[str, Value], Changes]:
    model = native_model(origin)
    name = model.family.lower()
    fields: dict[str, Value] = {"attention.head_count": 0}
    if model.layout is not None:
        return name, fields | _mamba2_fields(model.layout), _mamba2_changes(model.layout)
    if model.expand(origin) != 2:
        raise cannot_hold(origin, "has mixers that are not twice as wide as it", name, None)
    fields |= _ssm_fields(model.sizes, model.sizes.dt_rank) | {"ssm.dt_b_c_rms": False}
    return name, fields, {"mamba.A_log": _decay, "mamba.conv1d.weight": _taps}


def _mamba2_fields(layout: Mamba2Layout) -> dict[str, Value]:
    # the number of heads goes by the name of what Mamba-1 has there
    fields = _ssm_fields(layout.sizes, layout.sizes.n_heads)
    return fields | {"ssm.inner_size": layout.d_inner, "ssm.group_count": layout.groups}


def _ssm_fields(sizes: Mamba1Settings | Mamba2Settings, rank: int) -> dict[str, Value]:
    return {
        "ssm.conv_kernel": sizes.d_conv,
        "ssm.inner_size": sizes.d_inner,
        "ssm.state_size": sizes.d_state,
        "ssm.time_step_rank": rank,
    }


def _decay(A_log: Tensor) -> Tensor:
    return -A_log.exp()


def _taps(weight: Tensor) -> Tensor:
    return weight.squeeze(1)


def _mamba2_changes(layout: Mamba2Layout) -> Changes:
    found = {f"mamba.{name}": change for name, change in spreads(layout).items()}
    return found | {
        "mamba.conv1d.weight": lambda weight: _taps(layout.conv(weight)),
        "mamba.A_log": lambda A_log: _decay(A_log)[:, None],
        "mamba.D": lambda D: D[:, None],
        "mamba.norm.weight": lambda weight: layout.channels(weight).unflatten(
            0, (layout.groups, -1)
        ),
    }


def _steps(origin: Origin, changes: Changes) -> Iterator[Step]:
    """Every tensor; biases of a recurrent layer's projections fold into others or are zero."""
    names = set(origin.names)
    require_foldable(origin, "llama.cpp")
    for name in origin.names:
        _, _, part = name.removeprefix("model.layers.").partition(".")
        stem = name.removesuffix(part)
        if is_projection_bias(name):
            continue
        if part == "mamba.dt_bias":
            yield dt_bias_step(origin, name, gguf_name(name))
        elif part == "mamba.conv1d.weight" and f"{stem}mamba.conv1d.bias" not in names:
            yield Step((name,), partial(_with_bias, gguf_name(name), changes[part]))
        elif part in changes:
            yield changed(name, gguf_name(name), changes[part])
        else:
            yield renamed(name, gguf_name(name))


def _with_bias(name: str, change: Change, weight: Tensor) -> dict[str, Tensor]:
    """The taps of a convolution without bias, and the zeros that llama.cpp adds."""
    taps = of_kind(Tensor, change(weight))
    return {name: taps, f"{name.removesuffix('weight')}bias": taps.new_zeros(len(taps))}
