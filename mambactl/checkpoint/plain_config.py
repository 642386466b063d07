"""The layers of a checkpoint from its config.json alone, without torch and transformers.

Whether a configuration is good is for the classes of its family to say (`checkpoint.load.adapt`),
which take seconds to import. Most files raise no question, though: every key that decides something
is there, with an ordinary value. Those are described from here; of any other nothing is said.
"""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from mambactl.checkpoint.config_fields import (
    DecoderFields,
    Fields,
    Float,
    Identity,
    Layers,
    Positions,
    Size,
    Small,
    Token,
    Vocabulary,
    Word,
    read_fields,
)
from mambactl.checkpoint.reader import Reader
from mambactl.errors import ModelError
from mambactl.json_values import AnyObject
from mambactl.models.layout import MixerLayout, Section
from mambactl.models.mixers.sizes import SIZES, MixerSizes
from mambactl.present import present
from mambactl.registration import TYPE

# `model_type` of the families whose configurations can be read here -> their architecture
PLAIN = {
    TYPE: "HybridForCausalLM",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
ATTENTION = "attention"
# of some families alone: what makes them is not described here
UNUSUAL = frozenset(
    ("unrotated_layers", "post_norm", "embedding_multiplier", "attention_multiplier")
    + ("residual_multiplier", "logits_scaling")
)
SECTIONS = frozenset(name for sizes in SIZES.values() for name in sizes.sections)


def _is_float(value: object) -> object:
    # the classes take no integers there
    if type(value) is not float:
        raise ValueError("is no number with a point")
    return value


Fraction = Annotated[Small, BeforeValidator(_is_float)]
Base = Annotated[float, Field(ge=1, le=1e9)]
Factor = Annotated[float, Field(gt=0, le=1e6)]
Dropout = Annotated[float, Field(ge=0, lt=1)]
Letter = Literal["q", "k", "v", "o"]


class PlainFields(Fields):
    """Keys of a config.json with the values that every family takes; a number may not be null."""

    vocab_size: Vocabulary
    hidden_size: Size
    num_hidden_layers: Layers
    num_attention_heads: Size
    num_key_value_heads: Size
    head_dim: Size | None = None
    mixers: list[Word] | None = None
    # what has to be ordinary, and decides nothing here
    architectures: list[Word] | None = None
    attention_bias: bool | list[Letter] = False
    attention_dropout: Dropout = 0.0
    bos_token_id: Token | None = None
    dtype: Float | None = None
    eos_token_id: Token | list[Token] | None = None
    has_mlp: bool = True
    hidden_act: Literal["silu"] = "silu"
    initializer_range: Fraction = 0.02
    intermediate_size: Size = 1
    layer_types: list[Literal["full_attention"]] | None = None
    max_position_embeddings: Positions = 1
    max_window_layers: int = 0
    mlp_bias: bool = False
    pad_token_id: Token | None = None
    partial_rotary_factor: None = None
    pretraining_tp: int | None = None
    qk_norm: bool = False
    rms_norm_eps: Fraction = 1e-6
    rope_theta: Base = 1e4
    sliding_window: Positions | None = None
    tie_word_embeddings: bool = False
    torch_dtype: Float | None = None
    transformers_version: str | None = None
    use_cache: bool = True
    use_sliding_window: Literal[False] = False

    @property
    def width(self) -> int:
        """Channels of a head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads


class PlainAngles(Fields):
    """Rotary angles of a kind whose frequencies are finite for all values in these ranges."""

    model_config = Fields.model_config | {"extra": "forbid"}

    rope_type: Literal["default", "linear", "llama3"] | None = None
    # the older name, where the other is missing
    type: Literal["default", "linear", "llama3"] | None = None
    rope_theta: Base | None = None
    factor: Annotated[Factor, Field(ge=1)] | None = None
    low_freq_factor: Factor | None = None
    high_freq_factor: Factor | None = None
    original_max_position_embeddings: Positions | None = None


# kind of angles -> the keys that it needs
NEEDED = {
    "default": set(),
    "linear": {"factor"},
    "llama3": {
        *("factor", "low_freq_factor", "high_freq_factor"),
        "original_max_position_embeddings",
    },
}


@dataclass(frozen=True)
class PlainLayout(MixerLayout[MixerSizes[Any]]):
    """Layers with the sections of their mixers."""

    mixers: list[str]
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    sections: dict[str, Section]

    mixer_table = SIZES

    def stored(self, section: str) -> Section:
        """A section as config.json holds it."""
        return self.sections.get(section)


def plain_layout(reader: Reader) -> PlainLayout | None:
    """The layers of an open checkpoint; None where only the classes of its family can say.

    For a configuration that is described here, `checkpoint.load.adapt` finds no fault either.
    """
    try:
        return _layout(reader)
    except (ModelError, ValueError):
        # damaged or just unusual
        return None


def _layout(reader: Reader) -> PlainLayout | None:
    raw = reader.config
    identity = read_fields(Identity, raw, reader.path)
    kind = identity.model_type
    named = (identity.architectures or [PLAIN.get(kind or "")])[0]
    if kind is None or kind not in PLAIN or named != PLAIN[kind] or identity.quantization_config:
        return None
    if UNUSUAL & raw.keys():
        return None
    read_fields(DecoderFields, raw, reader.path)
    config = PlainFields(**{key: raw[key] for key in PlainFields.model_fields if key in raw})
    if not _is_ordinary(kind, config) or not _angles_are_plain(raw):
        return None
    sections = {name: raw[name] for name in SECTIONS if raw.get(name) is not None}
    if not all(_is_section(values) for values in sections.values()):
        return None
    mixers = config.mixers if kind == TYPE else None
    layout = PlainLayout(
        [ATTENTION] * config.num_hidden_layers if mixers is None else list(mixers),
        config.num_hidden_layers,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.width,
        sections,
    )
    layout.check_mixers()
    layout.check_heads()
    layout.check_settings()
    return layout


def _is_ordinary(kind: str, config: PlainFields) -> bool:
    """True if the values are consistent and no default of the family's class is needed."""
    if config.hidden_size % config.num_attention_heads and not (kind == TYPE and config.head_dim):
        return False
    if config.width % 2 or (config.pad_token_id or 0) >= config.vocab_size:
        return False
    if kind != TYPE and isinstance(config.attention_bias, list):
        return False
    # the class has a size of its own where the file names none
    if kind == "qwen3" and config.head_dim is None:
        return False
    return config.layer_types is None or len(config.layer_types) == config.num_hidden_layers


def _is_section(values: object) -> bool:
    if isinstance(values, list):
        return all(isinstance(each, dict | None) for each in values)
    return isinstance(values, dict)


def _angles_are_plain(raw: AnyObject) -> bool:
    given = [raw[key] for key in ("rope_scaling", "rope_parameters") if raw.get(key)]
    if not given:
        return True
    if len(given) > 1 or None in given[0].values():
        return False
    angles = PlainAngles(**given[0])
    kind = angles.rope_type or angles.type or "default"
    if any(getattr(angles, key) is None for key in NEEDED[kind]):
        return False
    return kind != "llama3" or present(angles.low_freq_factor) < present(angles.high_freq_factor)
