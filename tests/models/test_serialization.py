"""Saving, loading and casting."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from mambactl.models.config import HybridConfig
from mambactl.models.hybrid import HybridForCausalLM

EXACT = ("A_log", "D", "dt_bias")


def last(name: str) -> str:
    return name.rpartition(".")[2]


@pytest.mark.parametrize("loader", [AutoModelForCausalLM, HybridForCausalLM])
def test_a_saved_model_comes_back(any_model, draw_ids, uncached, tmp_path, loader) -> None:
    any_model.save_pretrained(tmp_path)
    again, report = loader.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(again) is HybridForCausalLM
    assert not again.training
    state = any_model.state_dict()
    assert again.state_dict().keys() == state.keys()
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    ids = draw_ids(2, 20)
    assert torch.equal(uncached(again, ids), uncached(any_model, ids))


def test_the_configuration_comes_back(any_model, tmp_path) -> None:
    any_model.config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert type(again) is HybridConfig
    for name in ("mixers", "mamba1", "mamba2", "head_dim", "has_mlp", "sliding_window"):
        assert getattr(again, name) == getattr(any_model.config, name)
    assert again.layers == any_model.config.layers


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loading_in_half_precision_keeps_decays_exact(mixed_model, tmp_path, dtype) -> None:
    mixed_model.save_pretrained(tmp_path)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    for name, tensor in half.state_dict().items():
        original = mixed_model.state_dict()[name]
        wanted = original if last(name) in EXACT else original.to(dtype)
        assert tensor.dtype == wanted.dtype, name
        assert torch.equal(tensor, wanted), name


@pytest.mark.parametrize(
    "cast",
    [
        lambda model: model.to(torch.bfloat16),
        lambda model: model.half(),
        lambda model: model.half().to(torch.bfloat16),
        lambda model: model.to("cpu", torch.bfloat16).float(),
    ],
    ids=["bfloat16", "half", "twice", "and back"],
)
def test_casting_keeps_decays_and_frequencies_exact(make_hybrid, cast, draw_ids) -> None:
    before = make_hybrid(["mamba2", "attention", "mamba1"])
    model = cast(make_hybrid(["mamba2", "attention", "mamba1"]))
    originals = dict(before.named_parameters())
    for name, parameter in model.named_parameters():
        if last(name) in EXACT:
            assert parameter.dtype == torch.float32
            assert torch.equal(parameter, originals[name])
            assert parameter.requires_grad
    # a rounded frequency is wrong by radians at position 1000
    assert torch.equal(model.model.rotary_emb.inv_freq, before.model.rotary_emb.inv_freq)
    assert model.lm_head.weight.dtype != torch.float64
    with torch.no_grad():
        logits = model(draw_ids(1, 40)).logits
        drift = (logits.float() - before(draw_ids(1, 40)).logits).std() / logits.float().std()
    assert drift < 0.1


def test_fp64_is_fp64_throughout(make_hybrid, draw_ids, assert_close) -> None:
    plain = make_hybrid(["mamba2", "attention", "mamba1"])
    model = make_hybrid(["mamba2", "attention", "mamba1"]).double()
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    ids = draw_ids(1, 70)
    with torch.no_grad():
        logits = model(ids).logits
        assert_close(plain(ids).logits.double(), logits)
    assert logits.dtype == torch.float64


def test_tied_embeddings_stay_tied(make_hybrid, draw_ids, uncached, tmp_path) -> None:
    model = make_hybrid(["mamba2", "attention"], tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    with torch.no_grad():
        again.model.embed_tokens.weight.mul_(2)
    hidden = again.model(draw_ids(1, 5), use_cache=False).last_hidden_state
    expected = hidden @ again.model.embed_tokens.weight.T
    torch.testing.assert_close(uncached(again, draw_ids(1, 5)), expected)
