"""Hybrids in the two layouts of the checkpoints that were released with arXiv 2408.15237.

Both have `mamba_config.json` beside the config.json of the Llama. `hf` keeps attention as a Llama
has it and gives each projection of a Mamba-1 mixer a tensor of its own; `fused` joins the
projections of every layer, and rotates attention by the plain base frequency alone.

The Mamba-1 of that code adds the bias of dt twice, so half of it is written; and it shares x and B
among groups of 16 channels, so channels are put in an order in which that shares the same.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from mambactl.checkpoint.container import json_text
from mambactl.checkpoint.mambainllama_reader import EPSILON, GROUP, MAMBA_CONFIG, PARTS
from mambactl.export.exported_form import Form, Origin, Step, cannot_hold, changed, renamed
from mambactl.export.mamba2_layout import mamba2_layout
from mambactl.export.projection_biases import dt_bias_step, is_projection_bias, require_foldable
from mambactl.export.to_transformers import require_plain_blocks, shared_fields
from mambactl.models.config import HybridConfig
from mambactl.models.mixers.settings import Mamba1Settings, Mamba2Settings
from mambactl.models.positions import rotary_of

_FORM = "MambaInLlama"
_PLAIN = "`mambactl convert TEACHER --mixer mamba1 --init reference` makes one that can"

Changes = dict[str, Callable[[Tensor], Tensor]]


def mambainllama_form(origin: Origin, fused: bool) -> Form:
    """The model in one of the layouts; ModelError where none holds it."""
    config = origin.config
    require_plain_blocks(origin, _FORM)
    if not config.replaced_layers:
        raise cannot_hold(origin, "has no recurrent layer", _FORM, "use `--to transformers`")
    if config.attention_bias:
        raise cannot_hold(origin, "has biases in its attention", _FORM, None)
    if fused and rotary_of(config).get("rope_type", "default") != "default":
        hint = "use `--layout hf`"
        raise cannot_hold(origin, "scales its rotary positions", f"the fused {_FORM}", hint)
    settings = config.layer(config.replaced_layers[0]).settings
    if type(settings) not in _KINDS:
        # it says what these layers are
        mamba2_layout(origin, _FORM)
    ssm_cfg, changes = _KINDS[type(settings)](origin)
    require_foldable(origin, _FORM)
    fields = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **shared_fields(config),
        "attention_bias": False,
        "mlp_bias": False,
    }
    files: dict[str, str | bytes] = {
        MAMBA_CONFIG: json_text(_mamba_config(config, settings, ssm_cfg))
    }
    return Form(_FORM, fields, list(_steps(origin, changes, fused)), files)


def _mamba_config(
    config: HybridConfig, settings: Mamba1Settings | Mamba2Settings, ssm_cfg: dict[str, object]
) -> dict[str, object]:
    return {
        "d_model": config.hidden_size,
        "ssm_cfg": ssm_cfg,
        "rms_norm_eps": config.rms_norm_eps,
        "vocab_size": None,
        "d_inner": settings.d_inner,
        "d_xb": config.num_key_value_heads * config.head_dim,
        "intermediate_size": config.intermediate_size,
        "hidden_act": config.hidden_act,
        "n_layer": config.num_hidden_layers,
        "attn_layers": config.attention_layers,
    }


def _mamba2(origin: Origin) -> tuple[dict[str, object], Changes]:
    config, s = origin.config, mamba2_layout(origin, _FORM).sizes
    heads, shared = config.num_attention_heads, config.num_key_value_heads
    whole = (s.n_heads, s.c_groups, s.norm_groups) == (heads,) * 3
    if not whole or (s.x_heads, s.b_groups) != (shared, shared) or s.d_state != config.head_dim:
        raise cannot_hold(origin, "has other heads than the attention it replaced", _FORM)
    if s.norm_eps != EPSILON:
        raise cannot_hold(origin, f"has norms of {s.norm_eps:g}", _FORM, None)
    return {"expand": 1, "ngroups": heads, "d_state": s.d_state}, {}


def _mamba1(origin: Origin) -> tuple[dict[str, object], Changes]:
    s = origin.config.section("mamba1")
    if s.native or s.d_state != GROUP or s.repeat_width % GROUP:
        found = f"has Mamba-1 mixers of {s.d_state} states"
        raise cannot_hold(origin, found, _FORM, _PLAIN)
    order = _channels(s)

    def ordered(rows: Tensor) -> Tensor:
        return rows[order]

    def halved(bias: Tensor) -> Tensor:
        return bias[order] / 2

    changes: Changes = dict.fromkeys(("dt_proj.weight", "A_log", "D"), ordered)
    changes |= dict.fromkeys(("conv1d.weight", "conv1d.bias"), ordered)
    changes |= {"dt_proj.bias": halved, "out_proj.weight": lambda weight: weight[:, order]}
    changes["in_proj.weight"] = partial(_in_rows, s, order)
    return {"expand": 1}, changes


# settings of the mixers -> `ssm_cfg` and how tensors of a mixer are stored
_KINDS: dict[type, Callable[[Origin], tuple[dict[str, object], Changes]]] = {
    Mamba1Settings: _mamba1,
    Mamba2Settings: _mamba2,
}


def _channels(s: Mamba1Settings) -> Tensor:
    """The order of our channels [d_inner] in which groups of 16 that share x follow each other."""
    group = torch.arange(s.d_inner // GROUP)
    width, shared = s.repeat_width // GROUP, s.d_inner // s.pair_dim
    source = group // width // shared * width + group % width
    order = source.argsort(stable=True)
    return (order[:, None] * GROUP + torch.arange(GROUP)).flatten()


def _in_rows(s: Mamba1Settings, order: Tensor, weight: Tensor) -> Tensor:
    z, x, B, C, dt = weight.split(list(s.in_rows))
    return torch.cat([z[order], x, B, C[order], dt])


def _steps(origin: Origin, changes: Changes, fused: bool) -> Iterator[Step]:
    for name in origin.names:
        mixer, attention = (name.partition(f".{part}.")[2] for part in ("mamba", "self_attn"))
        if is_projection_bias(name):
            continue
        if mixer == "dt_bias":
            yield dt_bias_step(origin, name, name)
        elif mixer == "in_proj.weight" and changes and not fused:
            yield Step((name,), partial(_split, origin.config, name, changes[mixer]))
        elif mixer in changes:
            yield changed(name, name, changes[mixer])
        elif fused and attention == "q_proj.weight":
            yield _joined_attention(name)
        elif fused and attention == "o_proj.weight":
            yield renamed(name, name.replace("self_attn.o_proj", "mha.out_proj"))
        elif not (fused and attention):
            yield renamed(name, name)


def _split(
    config: HybridConfig, name: str, change: Callable[[Tensor], Tensor], weight: Tensor
) -> dict[str, Tensor]:
    stem, rows = name.removesuffix("in_proj.weight"), config.section("mamba1").in_rows
    parts = zip(PARTS, change(weight).split(list(rows)), strict=True)
    return {f"{stem}{part}.weight": tensor for part, tensor in parts}


def _joined_attention(name: str) -> Step:
    sources = tuple(name.replace("q_proj", f"{letter}_proj") for letter in "qkv")
    joined = name.replace("self_attn.q_proj", "mha.in_proj")
    return Step(sources, lambda *parts: {joined: parts})
