"""Counted operations are those that torch counts where it can, and add up by their definition."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mambactl.models.key_ring import WindowSettings
from mambactl.models.mixers.registry import looks_up
from mambactl.train.ledger import Work, forward_flops, head_cost, mixer_cost, mlp_cost

LENGTH = 24


def _counted(call) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def test_a_transformers_forward_pass_is_what_torch_counts(make_hybrid) -> None:
    model = make_hybrid(["attention"] * 3)
    ids = torch.ones(2, LENGTH, dtype=torch.long)
    with torch.no_grad(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        counted = _counted(lambda: model(ids, use_cache=False))
    # torch counts all scores, of which causal attention needs half
    inner = model.config.num_attention_heads * model.config.head_dim
    unseen = 3 * 2 * LENGTH * inner * LENGTH * 2
    # some versions of transformers multiply matrices to get angles
    positions = torch.arange(LENGTH).expand(2, LENGTH)
    hidden = torch.zeros(2, LENGTH, model.config.hidden_size)
    angles = _counted(lambda: model.model.rotary_emb(hidden, positions))
    assert 2 * LENGTH * forward_flops(model.config, LENGTH) == counted - unseen - angles


@pytest.mark.parametrize("mixer", ["mamba2", "mamba1"])
def test_projections_of_a_mixer_are_what_torch_counts(make_hybrid, mixer) -> None:
    model = make_hybrid([mixer])
    layer = model.model.layers[0].mixer
    weights = {
        name: module.weight.numel()
        for name, module in layer.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    cost = mixer_cost(model.config, 0, LENGTH)
    assert cost.entrance == 2 * weights.pop("in_proj")
    assert cost.weights == 2 * sum(weights.values())
    s = layer.sizes
    heads = s.d_inner * s.d_state
    assert heads < cost.mixing < 20 * heads + 20 * s.d_inner * s.d_conv


def test_a_window_is_paid_for_and_no_more(make_hybrid) -> None:
    mixers = ["mamba2_window", "mamba2", "attention"]
    config = make_hybrid(mixers, mamba2_window=WindowSettings(64, 4)).config
    inner = config.num_attention_heads * config.head_dim
    cost, alone, attention = (mixer_cost(config, index, 4096) for index in range(3))
    assert cost.entrance == alone.entrance + attention.entrance
    assert cost.mixing == alone.mixing + 4 * inner * 68
    assert mixer_cost(config, 0, 64).mixing == alone.mixing + 4 * inner * 32


@pytest.mark.parametrize("rest", [False, True])
def test_a_training_step_is_what_torch_counts(make_hybrid, rest) -> None:
    """One attention block as a stand-in for all: what trains decides which gradients are made."""
    model = make_hybrid(["attention", "attention"])
    model.requires_grad_(rest)
    model.model.layers[1].self_attn.requires_grad_(True)
    for name, parameter in model.named_parameters():
        if looks_up(name):
            parameter.requires_grad_(False)
    ids = torch.ones(1, LENGTH, dtype=torch.long)

    def step() -> None:
        model(ids, use_cache=False).logits.sum().backward()

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        counted = _counted(step)
    work = Work(model.config, None, (1,), rest=rest)
    # scores of the future, in both passes of what is passed through; and what enters the first
    # trained weight needs no gradient, which only aligning counts: nor do its scores then
    inner = model.config.num_attention_heads * model.config.head_dim
    unseen = LENGTH * 2 * LENGTH * inner
    cost = mixer_cost(model.config, 0, LENGTH)
    first = 0.0 if rest else cost.entrance + 1.5 * cost.mixing
    passes = 6 if rest else 2.5
    assert counted - passes * unseen == pytest.approx(
        work.flops(1, LENGTH) - LENGTH * first, rel=0.02
    )


def test_pieces_add_up_and_repeats_do_not_count(make_hybrid) -> None:
    student = make_hybrid(["mamba2", "attention"] * 2).config
    teacher = make_hybrid(["attention"] * 4).config
    plain = Work(student, teacher, (0, 2), rest=True)
    again = Work(student, teacher, (0, 2), rest=True, checkpointing=True)
    assert plain.flops(2, LENGTH) == again.flops(2, LENGTH)
    blocks = forward_flops(student, LENGTH, head=False)
    pieces = again.pieces(LENGTH)
    assert sum(n for (_, how), n in pieces.items() if how == "repeat") == blocks
    teaching = sum(n for (_, how), n in pieces.items() if how == "infer")
    assert teaching == forward_flops(teacher, LENGTH, head=False)
    assert pieces["head", "train"] == 4 * head_cost(student)


def test_aligning_passes_only_through_mixers(make_hybrid) -> None:
    student = make_hybrid(["mamba2", "attention"]).config
    teacher = make_hybrid(["attention"] * 2).config
    pieces = Work(student, teacher, (0,), aligns=True).pieces(LENGTH)
    assert pieces.keys() == {("attention", "infer"), ("mamba2", "align")}
    cost = mixer_cost(student, 0, LENGTH)
    assert 2 * cost.forward < pieces["mamba2", "align"] < 3 * cost.forward
    assert mlp_cost(student) == 6 * 48 * 96


def test_a_window_bounds_what_attention_costs(make_hybrid) -> None:
    config = make_hybrid(["attention"], sliding_window=8).config
    short, long = (mixer_cost(config, 0, n).mixing for n in (8, 1024))
    assert long == 2 * short
