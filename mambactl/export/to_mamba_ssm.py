"""Native models for the package mamba_ssm: the format of state-spaces/mamba-* and mamba2-*.

Its loader takes exactly the fields of its MambaConfig, pads no vocabulary that is a multiple of
`pad_vocab_size_multiple`, wants the head also where it is the embedding, and has norms of 1e-5.
"""

from mambactl.checkpoint.adapters.mamba import native_name
from mambactl.export.exported_form import Form, Origin, cannot_hold, changed, renamed
from mambactl.export.native_mamba import NativeModel, is_native, native_model

_FORM = "mamba_ssm"
_EPSILON = 1e-5
_EMBEDDING, _HEAD = "backbone.embedding.weight", "lm_head.weight"


def mamba_ssm_form(origin: Origin) -> Form:
    """The model as mamba_ssm loads it; ModelError for a hybrid."""
    config = origin.config
    if not is_native(config):
        hint = "hybrids go to `--to transformers`, `gguf` or `mambainllama`"
        raise cannot_hold(origin, "has attention or MLPs", _FORM, hint)
    if config.rms_norm_eps != _EPSILON:
        raise cannot_hold(origin, f"has norms of {config.rms_norm_eps:g}", _FORM, None)
    model = native_model(origin)
    fields = {
        "d_model": config.hidden_size,
        "d_intermediate": 0,
        "n_layer": config.num_hidden_layers,
        "vocab_size": config.vocab_size,
        "ssm_cfg": _ssm_cfg(origin, model),
        "attn_layer_idx": [],
        "attn_cfg": {},
        "rms_norm": True,
        "residual_in_fp32": True,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": 1,
        "tie_embeddings": config.tie_word_embeddings,
    }
    steps = []
    for name in origin.names:
        change = model.changes.get(name.partition(".mamba.")[2])
        theirs = native_name(name).replace("backbone.embeddings", "backbone.embedding")
        steps.append(changed(name, theirs, change) if change else renamed(name, theirs))
    aliases = {_HEAD: _EMBEDDING} if config.tie_word_embeddings else {}
    return Form("MambaLMHeadModel", fields, steps, aliases=aliases)


def _ssm_cfg(origin: Origin, model: NativeModel) -> dict[str, object]:
    s = model.sizes
    shared = {
        "d_state": s.d_state,
        "d_conv": s.d_conv,
        "expand": model.expand(origin),
        "conv_bias": s.conv_bias,
        "bias": s.proj_bias,
    }
    return shared | _OWN[model.family](s)


_OWN = {
    "Mamba": lambda s: {"layer": "Mamba1", "dt_rank": s.dt_rank},
    "Mamba2": lambda s: {
        "layer": "Mamba2",
        "headdim": s.head_dim,
        "ngroups": s.norm_groups,
        "chunk_size": s.chunk_size,
    },
}
