"""Configuration of a hybrid decoder: a Llama configuration plus one mixer per layer."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig
from transformers.activations import ACT2FN

from mambactl.json_values import JsonObject
from mambactl.kernels.local_attention import LocalSpan
from mambactl.models.cache import LayerCache
from mambactl.models.layout import MixerLayout, Section
from mambactl.models.mixers.registry import ATTENTION, MIXERS
from mambactl.models.mixers.sections import section_values
from mambactl.models.mixers.spec import AnySpec
from mambactl.registration import AUTO_MAP, STUB, STUB_TEXT, TYPE

ARCHITECTURE = "HybridForCausalLM"
# properties that a config.json may name as well
DERIVED = ("layer_types", "auto_map", "base_model_tp_plan")
MLP_PARALLEL = {"gate_proj": "colwise", "up_proj": "colwise", "down_proj": "rowwise"}
# fields that an earlier version does not know, and where they say nothing
NEWER = {
    "qk_norm": False,
    "kept_heads": None,
    "unrotated_layers": None,
    "post_norm": False,
    "embedding_multiplier": 1.0,
    "attention_multiplier": None,
    "residual_multiplier": 1.0,
    "logits_scaling": 1.0,
}


MULTIPLIERS = tuple(name for name in NEWER if name.endswith(("_multiplier", "_scaling")))


@strict
class HybridConfig(MixerLayout[AnySpec], LlamaConfig):
    """A decoder whose layer i mixes tokens with `mixers[i]`, a name in `MIXERS`.

    Settings of mixers are sections of the configuration named after them (`mamba2`, `mamba1`,
    `mamba2_window`, `kept_heads`, or what a mixer's spec names): one dict for all layers, or a list
    with one for each. All other fields are Llama's. With only attention it is a Llama (or, with a
    sliding window, a Mistral); with only mamba mixers and `has_mlp=False` it is a native Mamba.
    """

    mixer_table = MIXERS
    model_type = TYPE
    # Llama's would hand a stage of a pipeline what no layer here takes
    base_model_pp_plan = None
    # of checkpoints that do not name it, too: some programs read it of every class not their own
    auto_map = AUTO_MAP

    if TYPE_CHECKING:
        # none of them is None behind __post_init__
        mixers: list[str] = field(default_factory=list)
        num_key_value_heads: int = 0  # pyright: ignore[reportIncompatibleVariableOverride]
        head_dim: int = 0  # pyright: ignore[reportIncompatibleVariableOverride]
    else:
        mixers: list[str] | None = None
    mamba2: Section = None
    mamba1: Section = None
    mamba2_window: Section = None
    kept_heads: Section = None
    # of all four projections, or the letters of those that have one: q, k, v, o
    attention_bias: bool | list[str] = False  # pyright: ignore[reportIncompatibleVariableOverride]
    # norms on queries and keys: True, of each head; "all", of all heads of a projection together
    qk_norm: bool | str = False
    # layers whose queries and keys are not rotated
    unrotated_layers: list[int] | None = None
    # norms behind mixers and MLPs, not in front of them
    post_norm: bool = False
    # of embeddings, of scores (None: 1 / sqrt(head_dim)), and of what each part adds to the stream
    embedding_multiplier: float | int = 1.0
    attention_multiplier: float | int | None = None
    residual_multiplier: float | int = 1.0
    # logits are divided by it
    logits_scaling: float | int = 1.0
    sliding_window: int | None = None
    has_mlp: bool = True

    def __post_init__(self, **kwargs: Any):
        if self.mixers is None:
            self.mixers = [ATTENTION.name] * self.num_hidden_layers
        # what follows from the mixers, or from the class, is not believed of a file
        for name in DERIVED:
            kwargs.pop(name, None)
        if self.architectures is None:
            self.architectures = [ARCHITECTURE]
        super().__post_init__(**kwargs)

    def to_dict(self) -> dict[str, Any]:
        """Return all fields; those of `NEWER` only where set, for versions without them."""
        every = super().to_dict().items()
        fields = {k: v for k, v in every if k not in NEWER or v not in (None, NEWER[k])}
        return fields | {"auto_map": dict(AUTO_MAP)}

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Write config.json, and beside it the code by which transformers loads the classes."""
        os.makedirs(save_directory, exist_ok=True)
        Path(save_directory, STUB).write_text(STUB_TEXT, encoding="utf-8")
        super().save_pretrained(save_directory, *args, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: object = "AutoConfig") -> None:
        """Do nothing: a checkpoint carries a file that imports this package, not a copy of it."""

    @property
    def layer_types(self) -> list[str]:
        """Kind of each layer's cache, in the words of transformers."""
        return [self._layer_type(name) for name in self.mixers]

    def _layer_type(self, mixer: str) -> str:
        # asked before the mixers are checked
        spec = MIXERS.get(mixer)
        if spec is not None and spec.is_attention:
            return "sliding_attention" if self.sliding_window else "full_attention"
        return "hybrid" if spec is not None and len(spec.branches) > 1 else "linear_attention"

    @property
    def base_model_tp_plan(self) -> dict[str, str] | None:
        """Plan of tensor parallelism by module; modules of Mamba mixers stay whole."""
        plan = {
            f"layers.*.{MIXERS[mixer].attribute}.{name}": how
            for mixer in self.mixers
            for name, how in MIXERS[mixer].tensor_parallel.items()
            # a norm over all heads needs them in one place
            if self.qk_norm != "all"
        }
        if self.has_mlp:
            plan |= {f"layers.*.mlp.{name}": how for name, how in MLP_PARALLEL.items()}
        return plan or None

    @base_model_tp_plan.setter
    def base_model_tp_plan(self, plan: object) -> None:
        """Do nothing: transformers 5.15 to 5.20 adds tied embeddings, which stay whole here."""

    def validate_architecture(self) -> None:
        """Check mixers and settings against each other; raises ValueError."""
        if self.mixers is None:
            return
        self.check_mixers()
        if not isinstance(self.attention_bias, bool) and set(self.attention_bias) - set("qkvo"):
            raise ValueError(f"attention_bias {self.attention_bias}: projections are q, k, v, o")
        self._check_sizes()
        self.check_settings()

    def _check_sizes(self) -> None:
        self.check_heads()
        if not 0 <= (self.attention_dropout or 0) < 1:
            raise ValueError(f"attention_dropout {self.attention_dropout}: a share from 0 to 1")
        if self.qk_norm not in (False, True, "all"):
            raise ValueError(f'qk_norm {self.qk_norm!r}: true, false or "all"')
        layers = set(range(self.num_hidden_layers))
        if set(self.unrotated_layers or ()) - layers:
            raise ValueError(f"unrotated_layers {self.unrotated_layers} of {len(layers)} layers")
        for name in MULTIPLIERS:
            if (value := getattr(self, name)) is not None and not 0 < value < float("inf"):
                raise ValueError(f"{name} {value}: a positive number")
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"hidden_act {self.hidden_act!r} is unknown")
        if self.pad_token_id is not None and not -1 <= self.pad_token_id < self.vocab_size:
            raise ValueError(f"pad_token_id {self.pad_token_id} is not in the vocabulary")

    def section(self, name: str) -> Any:
        """Settings of a section that all layers with it share.

        KeyError where no mixer of the model has that section, ValueError where layers differ.
        """
        found = [
            layer.spec.parts(layer.settings)[name]
            for layer in self.layers
            if name in layer.spec.sections
        ]
        if not found:
            raise KeyError(name)
        if any(other != found[0] for other in found):
            raise ValueError(f"layers have different `{name}` settings")
        return found[0]

    @property
    def attention_layers(self) -> list[int]:
        """Indices of the layers that mix with attention to all of the past."""
        return [layer.index for layer in self.layers if layer.spec.is_attention]

    @property
    def attention_heads(self) -> dict[int, tuple[int, ...]]:
        """KV heads that attend to all of the past, by layer."""
        return {layer.index: layer.spec.kept_heads(self, layer.settings) for layer in self.layers}

    def misfit(self, teacher: "HybridConfig") -> str | None:
        """Reason why this model cannot be aligned with the attention of `teacher`, or None."""
        fields = (("layers", "num_hidden_layers"), ("hidden units", "hidden_size"))
        for what, name in fields:
            ours, theirs = getattr(self, name), getattr(teacher, name)
            if ours != theirs:
                return f"the teacher has {theirs} {what}, the student {ours}"
        missing = sorted(set(self.replaced_layers) - set(teacher.attention_layers))
        return f"the teacher has no attention in the layers {missing}" if missing else None

    @property
    def local_spans(self) -> list[LocalSpan]:
        """Distinct spans of the windows beside recurrences."""
        found = (layer.spec.local_span(self, layer.settings) for layer in self.layers)
        return list(dict.fromkeys(span for span in found if span is not None))

    @property
    def kinds(self) -> list[str]:
        """A label for every layer: the mixer's name, numbered where its settings differ."""
        seen: dict[str, list[object]] = {}
        labels = []
        for layer in self.layers:
            known = seen.setdefault(layer.spec.name, [])
            if layer.settings not in known:
                known.append(layer.settings)
            number = known.index(layer.settings)
            labels.append(f"{layer.spec.name} {number + 1}" if number else layer.spec.name)
        return labels

    def rotated(self, index: int) -> bool:
        """True if queries and keys of a layer rotate with the position."""
        return index not in (self.unrotated_layers or ())

    @property
    def factors(self) -> list[str]:
        """Names of the factors that are not Llama's."""
        return [name for name in MULTIPLIERS if getattr(self, name) not in (None, NEWER[name])]

    @property
    def query_factor(self) -> float:
        """Factor of queries, for scores that are divided by sqrt(head_dim)."""
        wanted = self.attention_multiplier
        return 1.0 if wanted is None else wanted * self.head_dim**0.5

    @property
    def attends(self) -> bool:
        """True if any layer is bounded by the positions that it was trained on."""
        return any(layer.spec.has_positions(layer.settings) for layer in self.layers)

    def layer_caches(self) -> list[LayerCache]:
        """An empty cache for every layer."""
        return [layer.spec.cache(layer.settings) for layer in self.layers]

    def only(self, index: int, **fields: object) -> "HybridConfig":
        """A model of one layer alone; keywords give other fields."""
        return self.cut([index], **fields)

    def cut(self, indices: Sequence[int], **fields: object) -> "HybridConfig":
        """A model of these layers, in this order; keywords give other fields."""
        names = {name for other in MIXERS.values() for name in other.sections}
        sections: dict[str, list[object]] = {}
        for number, index in enumerate(indices):
            layer = self.layer(index)
            for name, part in layer.spec.parts(layer.settings).items():
                sections.setdefault(name, [None] * len(indices))[number] = part
        kept = {
            key: value
            for key, value in self.to_dict().items()
            if key not in ("model_type", "unrotated_layers") and key not in names
        }
        changed: JsonObject = {
            "num_hidden_layers": len(indices),
            "mixers": [self.layer(index).spec.name for index in indices],
            **{name: _stored(parts) for name, parts in sections.items()},
            **fields,
        }
        still = [number for number, index in enumerate(indices) if not self.rotated(index)]
        if still:
            changed["unrotated_layers"] = still
        return HybridConfig(**{**kept, **changed})

    def with_mixers(self, mixers: Sequence[str], **sections: Any) -> "HybridConfig":
        """A copy with other mixers; keywords give sections, of all layers or one of each."""
        fields = {key: value for key, value in self.to_dict().items() if key != "model_type"}
        fields.update(mixers=list(mixers), **{k: _stored(v) for k, v in sections.items()})
        return HybridConfig(**fields)

    def with_layers(self, changed: Mapping[int, tuple[AnySpec, Any]]) -> "HybridConfig":
        """A copy in which layers have another mixer, with the settings given."""
        layers = [changed.get(layer.index, (layer.spec, layer.settings)) for layer in self.layers]
        sections: dict[str, list[object]] = {}
        for index, (spec, settings) in enumerate(layers):
            for name, part in spec.parts(settings).items():
                sections.setdefault(name, [None] * len(layers))[index] = part
        return self.with_mixers([spec.name for spec, _ in layers], **sections)


def _stored(settings: object) -> Section:
    """A section as it is kept: one dict where all layers that have it agree, else a list."""
    if not isinstance(settings, Sequence):
        return section_values(settings)
    values = [None if one is None else section_values(one) for one in settings]
    given = [value for value in values if value is not None]
    return given[0] if given and all(value == given[0] for value in given) else values
