"""Settings that contradict each other are refused; derived sizes are those of the tensors."""

import pytest
from conftest import tiny_config
from huggingface_hub.errors import StrictDataclassError

from mambactl.models.config import HybridConfig
from mambactl.models.mixers.mamba1 import mamba1_from_attention
from mambactl.models.mixers.mamba2 import mamba2_from_attention


def test_mixers_must_cover_the_layers() -> None:
    with pytest.raises(StrictDataclassError, match="2 mixers for 3 layers"):
        HybridConfig(num_hidden_layers=3, mixers=["attention"] * 2)


def test_unknown_mixers_are_named() -> None:
    with pytest.raises(StrictDataclassError, match="'rwkv'.*attention, mamba2, mamba1"):
        HybridConfig(num_hidden_layers=1, mixers=["rwkv"])


def test_biases_are_those_of_named_projections(make_hybrid) -> None:
    mixer = make_hybrid(["attention"], attention_bias=["q", "v"]).model.layers[0].mixer
    assert {name for name in "qkvo" if getattr(mixer, f"{name}_proj").bias is not None} == {*"qv"}
    with pytest.raises(StrictDataclassError, match="projections are q, k, v, o"):
        HybridConfig(num_hidden_layers=1, attention_bias=["q", "x"])


@pytest.mark.parametrize("kind", ["mamba2", "mamba1"])
def test_mamba_layers_need_their_settings(kind) -> None:
    with pytest.raises(StrictDataclassError, match=f"no `{kind}` settings"):
        HybridConfig(num_hidden_layers=2, mixers=["attention", kind])


def test_a_plain_llama_is_all_attention() -> None:
    assert HybridConfig(num_hidden_layers=3).mixers == ["attention"] * 3


def test_layer_types_follow_from_the_mixers() -> None:
    config = HybridConfig(num_hidden_layers=2, layer_types=["linear_attention"] * 2)
    assert config.layer_types == ["full_attention"] * 2
    assert HybridConfig(num_hidden_layers=1, sliding_window=8).layer_types == ["sliding_attention"]
    mixers = ["mamba2", "mamba1", "mamba2_window", "mamba2_mixed", "attention"]
    named = ["linear_attention"] * 2 + ["hybrid"] * 2 + ["full_attention"]
    assert tiny_config(mixers).layer_types == named
    assert "layer_types" not in tiny_config(mixers).to_dict()


def test_other_mixers_leave_the_rest_alone() -> None:
    base = HybridConfig(
        num_hidden_layers=2, hidden_size=64, num_attention_heads=4, rms_norm_eps=3e-6
    )
    settings = mamba2_from_attention(base, proj_bias=True)
    changed = base.with_mixers(["mamba2", "attention"], mamba2=settings)
    assert changed.mixers == ["mamba2", "attention"]
    assert changed.section("mamba2") == settings
    assert base.mixers == ["attention"] * 2 and base.mamba2 is None
    for name in ("hidden_size", "head_dim", "rms_norm_eps", "rope_parameters", "vocab_size"):
        assert getattr(changed, name) == getattr(base, name)


def test_sizes_of_llama_3_8b_are_the_published_ones() -> None:
    base = HybridConfig(
        num_hidden_layers=32, hidden_size=4096, num_attention_heads=32, num_key_value_heads=8,
        head_dim=128,
    )  # fmt: skip
    two, one = mamba2_from_attention(base, False), mamba1_from_attention(base, 16, False)
    assert (sum(two.in_rows), two.conv_dim, two.d_inner) == (10272, 6144, 4096)
    assert (sum(one.in_rows), one.d_inner, one.dt_rank) == (10496, 4096, 256)


def test_parameters_have_the_sizes_of_the_settings(make_hybrid) -> None:
    model = make_hybrid(["mamba2", "mamba1"])
    two, one = (layer.mixer for layer in model.model.layers)
    assert two.in_proj.weight.shape == (sum(two.sizes.in_rows), 48)
    assert two.conv1d.weight.shape == (two.sizes.conv_dim, 1, 4)
    assert two.A_log.shape == two.D.shape == two.dt_bias.shape == (4,)
    assert one.in_proj.weight.shape == (sum(one.sizes.in_rows), 48)
    assert one.A_log.shape == (64, 16)
    assert one.dt_proj.weight.shape == (64, 3)
