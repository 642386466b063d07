"""The folder for transformers against what the loaders of vLLM and SGLang read; neither runs here.

Facts of their public GraniteMoeHybrid models: the fields, and the shapes that follow from them. A
`qkv_proj` there takes q, k and v, `A_log` is renamed, and layers are `mamba` or `attention`.
"""

import json

import pytest
from safetensors import safe_open

# fields that both read, and those of the older spelling of rotary positions that SGLang reads
FIELDS = {
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "hidden_act", "rms_norm_eps", "max_position_embeddings", "tie_word_embeddings", "layer_types",
    "attention_bias", "attention_multiplier", "embedding_multiplier", "logits_scaling",
    "residual_multiplier", "position_embedding_type", "num_local_experts", "num_experts_per_tok",
    "shared_intermediate_size", "intermediate_size", "rope_parameters", "rope_theta",
    "rope_scaling", "mamba_d_state", "mamba_d_conv", "mamba_expand", "mamba_conv_bias",
    "mamba_proj_bias", "mamba_n_groups", "mamba_n_heads", "mamba_d_head", "mamba_chunk_size",
}  # fmt: skip


def layer_shapes(config: dict, kind: str) -> dict[str, tuple[int, ...]]:
    """Tensors of a layer as the engines size them."""
    width, inner = config["hidden_size"], config["mamba_expand"] * config["hidden_size"]
    heads, groups = config["mamba_n_heads"], config["mamba_n_groups"]
    channels = inner + 2 * groups * config["mamba_d_state"]
    # heads of attention are a part of the model's width there, whatever `head_dim` says
    shared = config["num_key_value_heads"] * (width // config["num_attention_heads"])
    mlp = config["shared_intermediate_size"]
    found = {
        "input_layernorm.weight": (width,),
        "post_attention_layernorm.weight": (width,),
        "shared_mlp.input_linear.weight": (2 * mlp, width),
        "shared_mlp.output_linear.weight": (width, mlp),
    }
    if kind == "attention":
        found |= {
            "self_attn.q_proj.weight": (width, width),
            "self_attn.k_proj.weight": (shared, width),
            "self_attn.v_proj.weight": (shared, width),
            "self_attn.o_proj.weight": (width, width),
        }
        biases = {"q": width, "k": shared, "v": shared, "o": width}
        named = {f"self_attn.{name}_proj.bias": (size,) for name, size in biases.items()}
        return found | (named if config["attention_bias"] else {})
    found |= {
        "mamba.in_proj.weight": (inner + channels + heads, width),
        "mamba.conv1d.weight": (channels, 1, config["mamba_d_conv"]),
        "mamba.conv1d.bias": (channels,),
        "mamba.A_log": (heads,),
        "mamba.D": (heads,),
        "mamba.dt_bias": (heads,),
        "mamba.norm.weight": (inner,),
        "mamba.out_proj.weight": (width, inner),
    }
    biases = {"mamba.in_proj.bias": (inner + channels + heads,), "mamba.out_proj.bias": (width,)}
    return found | (biases if config["mamba_proj_bias"] else {})


@pytest.mark.parametrize("name", ["hybrid", "biased"])
def test_the_folder_fits_their_loaders(name: str, exported) -> None:
    folder = exported(name)
    config = json.loads((folder / "config.json").read_text())
    assert config.keys() >= FIELDS
    assert config["architectures"] == ["GraniteMoeHybridForCausalLM"]
    assert config["model_type"] == "granitemoehybrid"
    assert set(config["layer_types"]) == {"mamba", "attention"}
    assert config["num_local_experts"] == 0 and config["position_embedding_type"] == "rope"
    # SGLang takes the frequency and its scaling apart
    rotary = config["rope_parameters"]
    assert config["rope_theta"] == rotary["rope_theta"]
    scales = rotary["rope_type"] != "default"
    assert (config["rope_scaling"] or {}).get("factor") == (8.0 if scales else None)
    # both multiply by these; a model of ours has none
    ones = ("embedding_multiplier", "logits_scaling", "residual_multiplier")
    assert [config[key] for key in ones] == [1, 1, 1]
    width, heads = config["hidden_size"], config["num_attention_heads"]
    assert config["head_dim"] == width // heads
    assert config["attention_multiplier"] == (width // heads) ** -0.5
    # split over GPUs by heads and groups
    assert config["mamba_n_heads"] % config["mamba_n_groups"] == 0
    expected = {
        "model.embed_tokens.weight": (config["vocab_size"], width),
        "model.norm.weight": (width,),
    }
    if not config["tie_word_embeddings"]:
        expected["lm_head.weight"] = (config["vocab_size"], width)
    for index, kind in enumerate(config["layer_types"]):
        named = layer_shapes(config, kind).items()
        expected |= {f"model.layers.{index}.{part}": shape for part, shape in named}
    with safe_open(folder / "model.safetensors", "pt") as file:
        found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assert found == expected
