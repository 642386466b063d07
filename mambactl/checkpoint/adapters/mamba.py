"""Native Mamba-1 and Mamba-2: the transformers format and the original state-spaces one.

Both keep the tensors of a mixer in the layout our native mixers use, so only names change.
"""

from dataclasses import asdict

from mambactl.checkpoint.adapted import Adapted, build_config
from mambactl.checkpoint.config_fields import SsmFields, StateSpacesFields, read_fields
from mambactl.checkpoint.reader import Reader
from mambactl.errors import ModelError
from mambactl.json_values import JsonObject
from mambactl.models.config import HybridConfig
from mambactl.models.mixers.registry import with_settings
from mambactl.models.mixers.settings import Mamba1Settings, Mamba2Settings

STATE_SPACES = "state-spaces"
# the recurrence has no positions; this only bounds what generate() allows
_MAX_POSITIONS = 1 << 20

Settings = Mamba1Settings | Mamba2Settings


def adapt(reader: Reader) -> Adapted:
    """An attention-free, MLP-free hybrid; raises ModelError for variants it cannot express."""
    original = reader.config.get("model_type") is None
    fields, settings = (_original if original else _transformers)(reader)
    kind = with_settings(settings).name
    config = build_config(
        reader,
        HybridConfig,
        {
            **fields,
            kind: asdict(settings),
            "mixers": [kind] * fields["num_hidden_layers"],
            "has_mlp": False,
            "num_attention_heads": 1,
            "num_key_value_heads": 1,
            # no layer has angles, and the library wants pairs of channels for them
            "head_dim": fields["hidden_size"] + fields["hidden_size"] % 2,
            "intermediate_size": fields["hidden_size"],
            "max_position_embeddings": _MAX_POSITIONS,
        },
    )
    return Adapted(config, _names(reader, config.tie_word_embeddings))


def _names(reader: Reader, tied: bool) -> dict[str, str]:
    ours: dict[str, str] = {}
    for name in reader.names():
        if tied and name == "lm_head.weight":
            continue
        ours[_our_name(name)] = name
    return ours


# tensors as we call them, and as transformers does; of a layer what follows its number
_MODEL = (
    ("embed_tokens.weight", "embeddings.weight"),
    ("norm.weight", "norm_f.weight"),
)
_LAYER = (("input_layernorm.weight", "norm.weight"), ("mamba.", "mixer."))
_OURS, _THEIRS = "model.", "backbone."


def native_name(name: str) -> str:
    """The name in transformers of a tensor that we call `name`."""
    return _translated(name, _OURS, _THEIRS, dict(_MODEL), dict(_LAYER))


def _our_name(name: str) -> str:
    model, layer = ({theirs: ours for ours, theirs in table} for table in (_MODEL, _LAYER))
    # as state-spaces spells it
    name = name.replace(f"{_THEIRS}embedding.", f"{_THEIRS}embeddings.")
    return _translated(name, _THEIRS, _OURS, model, layer)


def _translated(
    name: str, root: str, other: str, model: dict[str, str], layer: dict[str, str]
) -> str:
    """A name with other words; one that is unknown stays, so that strict loading names it."""
    rest = name.removeprefix(root)
    if rest == name:
        return name
    if rest in model:
        return other + model[rest]
    match rest.split(".", 2):
        case ["layers", index, part]:
            for word, wanted in layer.items():
                if part == word or (word.endswith(".") and part.startswith(word)):
                    return f"{other}layers.{index}.{wanted}{part.removeprefix(word)}"
    return name


def _transformers(reader: Reader) -> tuple[JsonObject, Settings]:
    from transformers import Mamba2Config, MambaConfig

    family = {"mamba": MambaConfig, "mamba2": Mamba2Config}[reader.config["model_type"]]
    native = build_config(reader, family, reader.config)
    if native.hidden_act != "silu":
        raise _beyond(reader, f"the activation {native.hidden_act}")
    fields = {
        "vocab_size": native.vocab_size,
        "hidden_size": native.hidden_size,
        "num_hidden_layers": native.num_hidden_layers,
        "rms_norm_eps": native.layer_norm_epsilon,
        "tie_word_embeddings": native.tie_word_embeddings,
        "bos_token_id": native.bos_token_id,
        "eos_token_id": native.eos_token_id,
        "pad_token_id": native.pad_token_id,
        "dtype": native.dtype,
    }
    shared = {"d_conv": native.conv_kernel, "conv_bias": native.use_conv_bias}
    if family is MambaConfig:
        return fields, Mamba1Settings(
            d_inner=native.intermediate_size,
            dt_rank=int(native.time_step_rank),
            d_state=native.state_size,
            native=True,
            proj_bias=native.use_bias,
            **shared,
        )
    if tuple(native.time_step_limit) != (0.0, float("inf")):
        raise _beyond(reader, f"time_step_limit {native.time_step_limit}")
    return fields, Mamba2Settings(
        n_heads=native.num_heads,
        head_dim=native.head_dim,
        d_state=native.state_size,
        x_heads=native.num_heads,
        b_groups=native.n_groups,
        c_groups=native.n_groups,
        norm_groups=native.n_groups,
        norm_eps=native.layer_norm_epsilon,
        proj_bias=native.use_bias,
        **shared,
    )


def _original(reader: Reader) -> tuple[JsonObject, Settings]:
    config = read_fields(StateSpacesFields, reader.config, reader.path)
    for key in ("attn_layer_idx", "d_intermediate"):
        if value := getattr(config, key):
            raise _beyond(reader, f"{key} {value}")
    if not config.rms_norm:
        raise _beyond(reader, "LayerNorm instead of RMSNorm")
    embedding = "backbone.embedding.weight"
    if embedding not in reader.names() or not reader.shape(embedding):
        raise ModelError(f"{reader.path} has no {embedding} of rows", "fetch it again")
    fields = {
        # the file holds the padded vocabulary, its config the plain one
        "vocab_size": reader.shape(embedding)[0],
        "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layer,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": config.tie_embeddings,
        # the GPT-NeoX tokenizer these models were trained with ends a text with token 0
        "bos_token_id": 0,
        "eos_token_id": 0,
        "dtype": str(reader.dtype(embedding)).removeprefix("torch."),
    }
    return fields, _original_settings(reader, config.d_model, config.ssm_cfg or SsmFields())


def _original_settings(reader: Reader, width: int, ssm: SsmFields) -> Settings:
    d_inner = width * ssm.expand
    shared = {"d_conv": ssm.d_conv, "conv_bias": ssm.conv_bias, "proj_bias": ssm.bias}
    if ssm.layer == "Mamba1":
        return Mamba1Settings(
            d_inner=d_inner,
            dt_rank=-(-width // 16) if ssm.dt_rank == "auto" else ssm.dt_rank,
            d_state=ssm.d_state or 16,
            native=True,
            **shared,
        )
    plain = {"D_has_hdim": False, "rmsnorm": True, "norm_before_gate": False, "d_ssm": None}
    odd = [key for key, value in plain.items() if getattr(ssm, key) != value]
    if ssm.layer != "Mamba2" or odd:
        raise _beyond(reader, f"a {ssm.layer} layer with {', '.join(odd) or 'another design'}")
    heads = d_inner // ssm.headdim
    return Mamba2Settings(
        n_heads=heads,
        head_dim=ssm.headdim,
        d_state=ssm.d_state or 128,
        x_heads=heads,
        b_groups=ssm.ngroups,
        c_groups=ssm.ngroups,
        norm_groups=ssm.ngroups,
        **shared,
    )


def _beyond(reader: Reader, what: str) -> ModelError:
    return ModelError(f"{reader.path} uses {what}, which is not supported", "use another model")
