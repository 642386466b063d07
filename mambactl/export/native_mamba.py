"""Native Mamba and Mamba-2 models with the names and fields of transformers."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mambactl.checkpoint.adapters.mamba import native_name
from mambactl.export.exported_form import Change, Form, Origin, cannot_hold, changed, renamed
from mambactl.export.mamba2_layout import Mamba2Layout, mamba2_layout, spreads
from mambactl.models.config import HybridConfig
from mambactl.models.mixers.settings import Mamba1Settings, Mamba2Settings

Changes = dict[str, Change]


@dataclass(frozen=True)
class NativeModel:
    """Mixers of a native model: family and sizes; `layout` is that of Mamba-2."""

    family: str
    sizes: Any
    layout: Mamba2Layout | None = None

    @property
    def changes(self) -> Changes:
        """Functions for the tensors of a mixer that are stored in another shape, by name."""
        return {} if self.layout is None else spreads(self.layout)

    def expand(self, origin: Origin) -> int:
        """Width of the mixers in units of the model's; ModelError for a fraction."""
        inner, width = self.sizes.d_inner, origin.config.hidden_size
        if inner % width:
            found = f"has mixers of width {inner} in a model of width {width}"
            raise cannot_hold(origin, found, self.family, None)
        return inner // width


def is_native(config: HybridConfig) -> bool:
    """True if a model is plain Mamba or Mamba-2, with no attention and no MLP."""
    return not (config.has_mlp or config.attention_layers)


def native_model(origin: Origin) -> NativeModel:
    """The mixers of a native model; ModelError where they are of several kinds or converted."""
    kinds = {type(layer.settings) for layer in origin.config.layers}
    read = _READERS.get(next(iter(kinds)))
    if len(kinds) > 1 or read is None:
        raise cannot_hold(origin, "mixes kinds of mixers without MLPs", "a native Mamba", None)
    return read(origin)


def native_form(origin: Origin) -> Form:
    """MambaForCausalLM or Mamba2ForCausalLM."""
    model, config = native_model(origin), origin.config
    fields = {
        "architectures": [f"{model.family}ForCausalLM"],
        "model_type": model.family.lower(),
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "layer_norm_epsilon": config.rms_norm_eps,
        "hidden_act": "silu",
        "use_cache": True,
        "expand": model.expand(origin),
        "conv_kernel": model.sizes.d_conv,
        "use_bias": model.sizes.proj_bias,
        "use_conv_bias": model.sizes.conv_bias,
        "state_size": model.sizes.d_state,
        # the stream between the layers has the type of the weights
        "residual_in_fp32": False,
        **token_fields(config),
        **_FIELDS[model.family](model.sizes),
    }
    steps = []
    for name in origin.names:
        change = model.changes.get(name.partition(".mamba.")[2])
        theirs = native_name(name)
        steps.append(changed(name, theirs, change) if change else renamed(name, theirs))
    since = model.layout and model.layout.since
    return Form(f"{model.family}ForCausalLM", fields, steps, since=since)


def token_fields(config: HybridConfig) -> dict[str, object]:
    """Special tokens, and whether the head is the embedding."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings")
    return {name: getattr(config, name) for name in names}


def _mamba1(origin: Origin) -> NativeModel:
    config = origin.config
    sizes = config.section("mamba1")
    if not sizes.native:
        raise cannot_hold(origin, "has Mamba-1 mixers in the form of attention", "Mamba", None)
    return NativeModel("Mamba", sizes)


def _mamba2(origin: Origin) -> NativeModel:
    layout = mamba2_layout(origin, "Mamba2")
    return NativeModel("Mamba2", layout.sizes, layout)


# settings of mixers -> what a model of them is
_READERS: dict[type, Callable[[Origin], NativeModel]] = {
    Mamba1Settings: _mamba1,
    Mamba2Settings: _mamba2,
}
_FIELDS: dict[str, Callable[[Any], dict[str, object]]] = {
    "Mamba": lambda sizes: {"time_step_rank": sizes.dt_rank},
    "Mamba2": lambda sizes: {
        "num_heads": sizes.n_heads,
        "head_dim": sizes.head_dim,
        "n_groups": sizes.norm_groups,
        "chunk_size": sizes.chunk_size,
    },
}
