"""The keys of config.json that are read, with their types and ranges.

A key that is missing or null takes its family's default; keys that are not listed are not read.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from mambactl.bounds import LAYERS, VOCABULARY, WIDTH
from mambactl.files import CONFIG
from mambactl.foreign import fitted


def _is_dtype(value: object) -> object:
    # torch's own class, which must not be imported here
    known = value in FLOATS if isinstance(value, str) else type(value).__module__ == "torch"
    if not known:
        raise ValueError(f"is none of {', '.join(FLOATS)}")
    return value


Size = Annotated[int, Field(ge=1, le=WIDTH.most)]
Layers = Annotated[int, Field(ge=1, le=LAYERS.most)]
Vocabulary = Annotated[int, Field(ge=1, le=VOCABULARY.most)]
# -1 stands for none in some files
Token = Annotated[int, Field(ge=-1, lt=VOCABULARY.most)]
Positions = Annotated[int, Field(ge=1, lt=2**31)]
Number = Annotated[float, Field(ge=0, le=1e12, allow_inf_nan=False)]
Small = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Float = Literal["float64", "float32", "float16", "bfloat16"]
FLOATS = get_args(Float)
Dtype = Annotated[Any, AfterValidator(_is_dtype)]
# libraries repeat such a name in their warnings as it is
Word = Annotated[str, Field(pattern=r"^[\w.-]*$")]
RopeValue = Word | bool | Number | list[Number] | None


class Fields(BaseModel):
    """Base of the classes that read some keys of a config.json."""

    model_config = ConfigDict(
        strict=True, extra="ignore", frozen=True, arbitrary_types_allowed=True
    )


class Identity(Fields):
    """The keys of config.json that identify the architecture."""

    model_type: Word | None = None
    architectures: list[Word] | None = None
    auto_map: dict[str, str | list[str | None]] | None = None
    quantization_config: dict[str, object] | None = None
    ssm_cfg: dict[str, object] | None = None
    vocab_size: Vocabulary | None = None


class DecoderFields(Fields):
    """The keys of the transformers families and of our own format."""

    architectures: list[Word] | None = None
    vocab_size: Vocabulary | None = None
    hidden_size: Size | None = None
    intermediate_size: Size | None = None
    num_hidden_layers: Layers | None = None
    num_attention_heads: Size | None = None
    num_key_value_heads: Size | None = None
    head_dim: Size | None = None
    hidden_act: Word | None = None
    max_position_embeddings: Positions | None = None
    initializer_range: Small | None = None
    rms_norm_eps: Small | None = None
    rope_theta: Number | None = None
    rope_scaling: dict[Word, RopeValue] | None = None
    rope_parameters: dict[Word, RopeValue] | None = None
    partial_rotary_factor: Small | None = None
    tie_word_embeddings: bool | None = None
    attention_bias: bool | list[Word] | None = None
    mlp_bias: bool | None = None
    sliding_window: Positions | None = None
    use_sliding_window: bool | None = None
    max_window_layers: int | None = None
    layer_types: list[Word] | None = None
    bos_token_id: Token | list[Token] | None = None
    eos_token_id: Token | list[Token] | None = None
    pad_token_id: Token | None = None
    dtype: Dtype | None = None
    torch_dtype: Dtype | None = None
    # our own; sections of mixers are checked by their specs
    mixers: list[Word] | None = None
    qk_norm: bool | Literal["all"] | None = None
    post_norm: bool | None = None
    unrotated_layers: list[int] | None = None
    has_mlp: bool | None = None
    # of SmolLM3 and Granite
    no_rope_layers: list[int] | None = None
    no_rope_layer_interval: Annotated[int, Field(ge=1)] | None = None
    embedding_multiplier: Number | None = None
    attention_multiplier: Number | None = None
    residual_multiplier: Number | None = None
    logits_scaling: Number | None = None
    # of Mamba
    state_size: Size | None = None
    expand: Annotated[float, Field(gt=0, le=64)] | None = None
    conv_kernel: Size | None = None
    num_heads: Size | None = None
    n_groups: Size | None = None
    time_step_rank: Size | Literal["auto"] | None = None
    time_step_limit: Annotated[list[float], Field(min_length=2, max_length=2)] | None = None
    layer_norm_epsilon: Small | None = None
    use_bias: bool | None = None
    use_conv_bias: bool | None = None
    chunk_size: Size | None = None


class SsmFields(Fields):
    """Keys of `ssm_cfg` in the state-spaces format."""

    layer: str = "Mamba1"
    expand: Annotated[int, Field(ge=1, le=64)] = 2
    d_conv: Size = 4
    conv_bias: bool = True
    bias: bool = False
    dt_rank: Size | Literal["auto"] = "auto"
    d_state: Size | None = None
    headdim: Size = 64
    ngroups: Size = 1
    D_has_hdim: bool = False
    rmsnorm: bool = True
    norm_before_gate: bool = False
    d_ssm: Size | None = None


class StateSpacesFields(Fields):
    """The keys of the state-spaces format."""

    d_model: Size
    n_layer: Layers
    ssm_cfg: SsmFields | None = None
    tie_embeddings: bool = True
    attn_layer_idx: list[int] | None = None
    d_intermediate: int | None = None
    rms_norm: bool = True


class ReleasedFields(Fields):
    """The keys of a mamba_config.json that say which layers are recurrent; sizes are in tensors."""

    n_layer: Layers | None = None
    attn_layers: list[int] | None = None


class GenerationFields(Fields):
    """The keys of a generation_config.json that decoding reads."""

    bos_token_id: Token | list[Token] | None = None
    eos_token_id: Token | list[Token] | None = None
    pad_token_id: Token | list[Token] | None = None


Kind = TypeVar("Kind", bound=Fields)


def read_fields(
    kind: type[Kind], raw: Mapping[str, object], where: Path, file: str = CONFIG
) -> Kind:
    """The keys of `kind` in a JSON object; ModelError for the first that cannot be used."""
    return fitted(kind, raw, where, file, hint=f"fetch it again, or correct {file}")
