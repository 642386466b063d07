"""Adapters act in every projection while training, and are the same once merged."""

import warnings

import pytest
import torch

from mambactl.data.pack import collate
from mambactl.options import SftConfig
from mambactl.train.optimization import last_hidden

pytest.importorskip("peft", reason='pip install "mambactl[lora]"')

from mambactl.train.lora import adapted, merged, plain, projections

CONFIG = SftConfig(lora=4)


def hidden(model, rows):
    return last_hidden(plain(model), collate(rows))


def randomize(model):
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=draw))


def test_every_projection_of_every_mixer_and_mlp_is_adapted(pair):
    found = set(projections(pair[0]))
    assert {
        "model.layers.0.mamba.in_proj", "model.layers.0.mamba.out_proj",
        "model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.k_proj",
        "model.layers.1.self_attn.v_proj", "model.layers.1.self_attn.o_proj",
        "model.layers.2.mamba.dt_proj", "model.layers.3.mlp.gate_proj",
        "model.layers.3.mlp.up_proj", "model.layers.3.mlp.down_proj",
    } <= found  # fmt: skip
    assert not any("lm_head" in name or "embed" in name for name in found)


def test_a_fresh_adapter_changes_nothing_and_trains_alone(pair, rows):
    student, _ = pair
    before = hidden(student, rows)
    model = adapted(student, CONFIG)
    torch.testing.assert_close(hidden(model, rows), before)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in name for name in trained)


def test_adapters_are_made_without_a_word(pair):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapted(pair[0], CONFIG)


def test_every_adapter_gets_a_gradient(pair, rows):
    """Also of those whose projections are multiplied together, by their weights, in training."""
    model = adapted(pair[0], CONFIG)
    randomize(model)
    hidden(model, rows).square().sum().backward()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_merged_weights_do_what_the_adapters_did(pair, rows):
    student, _ = pair
    before = hidden(student, rows)
    keys = student.state_dict().keys()
    model = adapted(student, CONFIG)
    randomize(model)
    wanted = hidden(model, rows)
    assert (wanted - before).abs().max() > 1e-2
    whole = merged(model)
    assert type(whole) is type(student) and whole.state_dict().keys() == keys
    torch.testing.assert_close(hidden(whole, rows), wanted, rtol=1e-4, atol=1e-4)


def test_alpha_scales_and_none_is_none(pair, rows):
    student, _ = pair
    assert adapted(student, SftConfig()) is student and merged(student) is student
    model = adapted(student, SftConfig(lora=4, lora_alpha=2))
    assert model.base_model.model.model.layers[0].mamba.in_proj.scaling["default"] == 0.5
