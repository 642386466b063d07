"""Weights stacked for the decode kernels: views of one storage, in a model that works as before."""

import pytest
import torch

from mambactl.decode.gpu.state import pack
from mambactl.models.mixers.attention import PackedAttention
from mambactl.models.mixers.mamba1 import PackedMamba1, mamba1_from_attention
from mambactl.models.mixers.mamba2 import mamba2_from_attention
from mambactl.models.mixers.mamba2_decode import PackedMamba2
from mambactl.models.mixers.windowed import PackedWindowed
from mambactl.models.packed import NotSupported


def storage(tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def owned(model, packed) -> list:
    """Packed tensors that are the model's own weights."""
    tensors = [packed.table, packed.gain, packed.head]
    for layer in packed.layers:
        m = layer.mixer
        tensors += [layer.gain, layer.mlp_gain, layer.gate_up, layer.down]
        if (attention := m.attention) is not None:
            projections = attention.qkv, attention.out
            tensors += [part for one in projections for part in (one.weight, one.bias)]
        m = m.recurrence if isinstance(m, PackedWindowed) else m
        if not isinstance(m, PackedAttention):
            tensors += [m.inner.weight, m.inner.bias, m.out.weight, m.out.bias]
            tensors += [m.low, m.dt.weight] if isinstance(m, PackedMamba1) else [m.gain]
    return [tensor for tensor in tensors if tensor is not None]


def test_the_model_computes_what_it_did(any_model, draw_ids, uncached) -> None:
    ids = draw_ids(2, 9)
    before, names = uncached(any_model, ids), dict(any_model.state_dict())
    values = {name: tensor.clone() for name, tensor in names.items()}
    pack(any_model, 32)
    assert torch.equal(uncached(any_model, ids), before)
    after = any_model.state_dict()
    assert after.keys() == values.keys()
    for name, tensor in after.items():
        assert torch.equal(tensor, values[name]), name


def test_nothing_is_held_twice_and_a_second_time_copies_nothing(any_model) -> None:
    packed = pack(any_model, 32)
    held = {storage(parameter) for parameter in any_model.parameters()}
    first = owned(any_model, packed)
    assert {storage(tensor) for tensor in first} <= held
    again = owned(any_model, pack(any_model, 64))
    for one, other in zip(first, again, strict=True):
        assert one.data_ptr() == other.data_ptr() and one.shape == other.shape
    # stacks and parameters together take what the parameters took
    size = {storage(p): p.untyped_storage().nbytes() for p in any_model.parameters()}
    assert sum(size.values()) == sum(p.nbytes for p in set(any_model.parameters()))


def test_stacks_are_the_parameters_in_order(mixed_model) -> None:
    packed = pack(mixed_model, 32)
    attention, block = packed.layers[1].mixer, mixed_model.model.layers[1]
    parts = [block.mixer.q_proj.weight, block.mixer.k_proj.weight, block.mixer.v_proj.weight]
    assert torch.equal(attention.qkv.weight, torch.cat(parts))
    gates = [block.mlp.gate_proj.weight, block.mlp.up_proj.weight]
    assert torch.equal(packed.layers[1].gate_up, torch.cat(gates))
    with torch.no_grad():
        block.mlp.up_proj.weight[3] = 7
        block.mixer.v_proj.weight[-1] = 8
    assert (packed.layers[1].gate_up[len(gates[0]) + 3] == 7).all()
    assert (attention.qkv.weight[-1] == 8).all()


def test_a_model_packed_before_it_moves_is_packed_again(mixed_model, draw_ids, uncached) -> None:
    pack(mixed_model, 32)
    mixed_model.to(torch.bfloat16)
    expected = uncached(mixed_model, draw_ids(1, 5))
    packed = pack(mixed_model, 32)
    assert packed.layers[1].mixer.qkv.weight.dtype == torch.bfloat16
    held = {storage(parameter) for parameter in mixed_model.parameters()}
    assert {storage(tensor) for tensor in owned(mixed_model, packed)} <= held
    assert torch.equal(uncached(mixed_model, draw_ids(1, 5)), expected)


def test_rotations_are_those_of_the_model(mixed_model, make_hybrid) -> None:
    packed = pack(mixed_model, 50).rotations
    assert packed.cos.shape == packed.sin.shape == (50, 8)
    angle = torch.arange(50)[:, None] * 10000.0 ** (-torch.arange(8) / 8)
    torch.testing.assert_close(packed.cos, angle.cos(), rtol=0, atol=1e-5)
    torch.testing.assert_close(packed.sin, angle.sin(), rtol=0, atol=1e-5)
    assert pack(make_hybrid(["mamba2"]), 50).rotations is None


def test_states_turn_by_the_rotations_of_keys_but_for_one_pair(make_hybrid) -> None:
    """Also where no layer has keys."""
    config = make_hybrid(["attention"]).config
    rotary = mamba2_from_attention(config, proj_bias=True, rotary=True)
    packed = pack(make_hybrid(["mamba2"] * 2, mamba2=rotary), 50)
    one, other = (layer.mixer.rotation for layer in packed.layers)
    assert one is other and packed.layers[0].mixer.attention is None
    whole_tables = packed.rotations.cos, packed.rotations.sin
    for table, whole, first in zip(one, whole_tables, (1, 0), strict=True):
        assert torch.equal(table[:, 1:], whole[:, 1:]) and (table[:, 0] == first).all()


def test_a_window_is_not_the_sliding_window_of_attention_layers(make_hybrid) -> None:
    model = make_hybrid(["mamba2_window", "attention", "mamba2"], sliding_window=5)
    near, far = (layer.mixer.attention for layer in pack(model, 8).layers[:2])
    assert (near.window, near.sinks, far.window, far.sinks) == (7, 3, 5, 0)


@pytest.mark.parametrize("taps", [2, 3, 4])
@pytest.mark.parametrize("kind", ["mamba1", "mamba2"])
def test_shorter_convolutions_are_filled_up_in_front(make_hybrid, kind, taps) -> None:
    packed = pack(make_hybrid([kind], **settings(make_hybrid, kind, d_conv=taps)), 8)
    weight = packed.layers[0].mixer.conv.weight
    assert weight.shape[1] == 4 and weight.is_contiguous()
    assert (weight[:, : 4 - taps] == 0).all() and (weight[:, 4 - taps :] != 0).all()


def test_constants(mixed_model) -> None:
    packed = pack(mixed_model, 8)
    second, _, first = (layer.mixer for layer in packed.layers)
    assert isinstance(second, PackedMamba2) and isinstance(first, PackedMamba1)
    for mixer, block in ((second, 0), (first, 2)):
        own = mixed_model.model.layers[block].mixer
        assert torch.equal(mixer.A, -own.A_log.float().exp())
        assert mixer.A.dtype == mixer.D.dtype == torch.float32
        assert (mixer.conv.weight == own.conv1d.weight[:, 0]).all()
    assert packed.stores_every_step and second.norm_by_head


def settings(make_hybrid, kind: str, **changes) -> dict:
    """Keyword of make_hybrid that changes a mixer's settings."""
    from dataclasses import replace

    config = make_hybrid(["attention"]).config
    if kind == "mamba2":
        return {kind: replace(mamba2_from_attention(config, proj_bias=True), **changes)}
    return {kind: replace(mamba1_from_attention(config, 16, proj_bias=False), **changes)}


def refused(make_hybrid, why: str):
    model = {
        "activation": lambda: make_hybrid(["mamba2"], hidden_act="gelu"),
        "biases": lambda: make_hybrid(["mamba2"], mlp_bias=True),
        "float16": lambda: make_hybrid(["mamba2"]).to(torch.float16),
        "float64": lambda: make_hybrid(["mamba2"]).to(torch.float64),
        "5 taps": lambda: make_hybrid(["mamba2"], **settings(make_hybrid, "mamba2", d_conv=5)),
    }[why]  # fmt: skip
    return model()


@pytest.mark.parametrize("why", ["activation", "biases", "float16", "float64", "5 taps"])
def test_what_the_kernels_do_not_compute_is_refused(make_hybrid, why) -> None:
    with pytest.raises(NotSupported, match=why):
        pack(refused(make_hybrid, why), 8)
