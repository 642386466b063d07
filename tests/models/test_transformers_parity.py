"""The library's own Llama, Mistral and GraniteMoeHybrid compute what the hybrid computes."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import (
    GraniteMoeHybridConfig,
    GraniteMoeHybridForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from mambactl.models.cache import HybridCache
from mambactl.models.config import HybridConfig
from mambactl.models.hybrid import HybridForCausalLM
from mambactl.models.mixers.mamba2 import mamba2_from_attention

SIZES = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "rms_norm_eps": 1e-5,
    "initializer_range": 0.2, "max_position_embeddings": 4096, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0,
}  # fmt: skip
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}


def library_model(kind: type, config):
    torch.manual_seed(0)
    model = kind(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.normal_(std=0.2)
    return model


def as_hybrid(model) -> HybridForCausalLM:
    """The same weights under the same names, strictly."""
    fields = {k: v for k, v in model.config.to_dict().items() if k != "model_type"}
    hybrid = HybridForCausalLM(HybridConfig(**fields)).eval()
    hybrid.load_state_dict(model.state_dict())
    return hybrid


def stepwise(model, ids: Tensor, start: int) -> Tensor:
    """Logits [B, T, V] of a prompt of `start` tokens and one token after another."""
    cache = HybridCache(model.config, len(ids))
    lengths = [start, *[1] * (ids.shape[1] - start)]
    with torch.no_grad():
        return torch.cat([model(p, past_key_values=cache).logits for p in ids.split(lengths, 1)], 1)


@pytest.mark.parametrize("rope", [ROPE, LLAMA3, LINEAR], ids=lambda rope: rope["rope_type"])
@pytest.mark.parametrize("options", [{}, {"attention_bias": True}, {"tie_word_embeddings": True}])
def test_llama(draw_ids, uncached, rope, options) -> None:
    llama = library_model(LlamaForCausalLM, LlamaConfig(**SIZES, rope_parameters=rope, **options))
    hybrid = as_hybrid(llama)
    ids = draw_ids(2, 150)
    expected = uncached(llama, ids)
    scale = float(expected.abs().max())
    for actual in (uncached(hybrid, ids), stepwise(hybrid, ids, 140)):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * scale)


def test_rope_scaling_changes_something(draw_ids, uncached) -> None:
    ids = draw_ids(1, 150)
    logits = [
        uncached(
            as_hybrid(library_model(LlamaForCausalLM, LlamaConfig(**SIZES, rope_parameters=r))), ids
        )
        for r in (ROPE, LLAMA3)
    ]
    assert not torch.allclose(*logits, atol=0.1)


@pytest.mark.parametrize("window", [5, 32, None])
def test_mistral(draw_ids, uncached, window) -> None:
    config = MistralConfig(**SIZES, rope_parameters=ROPE, sliding_window=window)
    mistral = library_model(MistralForCausalLM, config)
    hybrid = as_hybrid(mistral)
    assert hybrid.config.sliding_window == window
    ids = draw_ids(2, 90)
    expected = uncached(mistral, ids)
    for actual in (uncached(hybrid, ids), stepwise(hybrid, ids, 3), stepwise(hybrid, ids, 60)):
        torch.testing.assert_close(actual, expected, rtol=0, atol=2e-4)


def test_the_window_reaches_ragged_rows(draw_ids, uncached) -> None:
    config = MistralConfig(**SIZES, rope_parameters=ROPE, sliding_window=5)
    hybrid = as_hybrid(library_model(MistralForCausalLM, config))
    ids, cache = draw_ids(2, 40), HybridCache(hybrid.config, 2)
    with torch.no_grad():
        hybrid(ids[:, :20], past_key_values=cache, n_new=torch.tensor([20, 7]))
        after = torch.stack([ids[0, 20:23], ids[1, 7:10]])
        logits = hybrid(after, past_key_values=cache).logits
    for row, stop in enumerate((23, 10)):
        alone = uncached(hybrid, ids[row : row + 1, :stop])[0, -3:]
        torch.testing.assert_close(logits[row], alone, rtol=0, atol=2e-4)


def repeat_heads(rows: Tensor, heads: int, repeat: int) -> Tensor:
    """[heads P, ...] -> [heads repeat P, ...]: every head `repeat` times in a row."""
    return rows.unflatten(0, (heads, -1)).repeat_interleave(repeat, 0).flatten(0, 1)


def to_granite(hybrid: HybridForCausalLM) -> GraniteMoeHybridForCausalLM:
    """The hybrid's weights in the library's layout, which has one x head and B group per head."""
    config, s = hybrid.config, hybrid.config.section("mamba2")
    repeat = s.n_heads // s.x_heads

    def expand(rows: Tensor) -> Tensor:
        x, B, C = rows.split(s.in_rows[1:4])
        wide = (repeat_heads(part, s.x_heads, repeat) for part in (x, B))
        return torch.cat([*wide, C])

    weights = {}
    for name, tensor in hybrid.state_dict().items():
        if ".mamba.in_proj." in name:
            z, inner, dt = tensor.split([s.d_inner, s.conv_dim, s.n_heads])
            tensor = torch.cat([z, expand(inner), dt])
        elif ".mamba.conv1d." in name:
            tensor = expand(tensor)
        elif name.endswith("up_proj.weight"):
            continue
        elif name.endswith("gate_proj.weight"):
            up = hybrid.state_dict()[name.replace("gate_proj", "up_proj")]
            tensor, name = torch.cat([tensor, up]), name.replace("gate_proj", "input_linear")
        name = name.replace("down_proj", "output_linear").replace(".mlp.", ".shared_mlp.")
        weights[name] = tensor
    granite = GraniteMoeHybridForCausalLM(
        GraniteMoeHybridConfig(
            **{k: v for k, v in SIZES.items() if k not in ("head_dim", "num_hidden_layers")},
            num_hidden_layers=len(config.mixers),
            rope_parameters=ROPE, position_embedding_type="rope", tie_word_embeddings=False,
            attention_multiplier=config.head_dim**-0.5, num_local_experts=0, num_experts_per_tok=0,
            shared_intermediate_size=config.intermediate_size,
            layer_types=["full_attention" if m == "attention" else "linear_attention"
                         for m in config.mixers],
            mamba_n_heads=s.n_heads, mamba_d_head=s.head_dim, mamba_n_groups=s.n_heads,
            mamba_d_state=s.d_state, mamba_d_conv=s.d_conv, mamba_expand=1, mamba_chunk_size=16,
            mamba_conv_bias=True, mamba_proj_bias=s.proj_bias,
        )
    ).eval()  # fmt: skip
    granite.load_state_dict(weights)
    return granite


@pytest.mark.since_transformers("5.23", "norms all groups together")
@pytest.mark.parametrize("proj_bias", [True, False])
@pytest.mark.parametrize("mixers", [["mamba2"] * 2, ["mamba2", "attention", "mamba2"]],
                         ids=["mamba2", "mixed"])  # fmt: skip
def test_granite_hybrid(make_hybrid, draw_ids, uncached, mixers, proj_bias) -> None:
    base = HybridConfig(**SIZES)
    settings = replace(mamba2_from_attention(base, proj_bias), chunk_size=32)
    hybrid = make_hybrid(mixers, seed=7, hidden_size=64, mamba2=settings)
    granite = to_granite(hybrid)
    ids = draw_ids(2, 70)
    expected = uncached(granite, ids)
    scale = float(expected.abs().max())
    for actual in (uncached(hybrid, ids), stepwise(hybrid, ids, 50)):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4 * scale)
