"""A layer that keeps some KV heads, beside the attention that it was made from."""

import json

import pytest
import torch
from conftest import tiny_config
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor

from mambactl.data.pack import Batch
from mambactl.models.cache import HybridCache
from mambactl.models.config import HybridConfig
from mambactl.models.hybrid import HybridForCausalLM
from mambactl.models.mixers.attention import weights_of
from mambactl.models.mixers.registry import ATTENTION, MIXERS, is_new
from mambactl.models.mixers.spec import MixerForm
from mambactl.options import SftConfig
from mambactl.speed.limits import bytes_per_step
from mambactl.train.optimization import AlignmentObjective
from mambactl.train.phases import PhasePlan, shapes_of

MIXED = MIXERS["mamba2_mixed"]
PARTS = ("attention", "window")
LENGTH = 40
TEACHERS = {
    "gqa": {"num_attention_heads": 6, "num_key_value_heads": 3},
    "no gqa": {"num_attention_heads": 4, "num_key_value_heads": 4},
    "all biases": {"attention_bias": True},
    "biases of q, k, v": {"attention_bias": ["q", "k", "v"]},
    "norms on heads": {"qk_norm": True},
    "sliding window": {"sliding_window": 9},
}


def student_of(teacher: HybridForCausalLM, window: int, sinks: int = 0) -> HybridForCausalLM:
    """Its copy whose layers 0 and 2 keep the last KV head, with a silent recurrence."""
    base = teacher.config
    kept = (base.num_key_value_heads - 1,)
    form = MixerForm("calibrated", window, sinks, kept=kept)
    config = base.with_layers(
        {index: (MIXED, MIXED.from_attention(base, form, index)) for index in (0, 2)}
    )
    student = HybridForCausalLM(config).to(teacher.dtype).eval()
    student.load_state_dict(teacher.state_dict(), strict=False)
    for index in (0, 2):
        block = teacher.model.layers[index]
        weights = weights_of(block.mixer, block.input_layernorm.weight)
        with torch.no_grad():
            MIXED.initialise(student.model.layers[index].mixer, weights, "calibrated", None)
    return student


@pytest.fixture(params=TEACHERS)
def teacher(request, make_hybrid) -> HybridForCausalLM:
    return make_hybrid(["attention"] * 3, seed=1, **TEACHERS[request.param]).double()


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(3, 97, (2, LENGTH), generator=torch.Generator().manual_seed(0))


def rows_of(weight: Tensor, heads: list[int], count: int) -> Tensor:
    return weight.unflatten(0, (count, -1))[heads].flatten(0, 1)


@torch.no_grad()
def test_with_a_window_that_sees_everything_it_is_the_teacher(teacher, ids) -> None:
    """A teacher's own window is everything that it sees."""
    student = student_of(teacher, teacher.config.sliding_window or LENGTH)
    packed = {"seq_idx": (torch.arange(LENGTH) >= 17).long().expand(2, -1)}
    for keywords in ({}, packed):
        wanted = teacher(ids, use_cache=False, **keywords).logits
        found = student(ids, use_cache=False, **keywords).logits
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_kept_heads_are_the_teachers_and_the_others_see_the_window(teacher, ids) -> None:
    student = student_of(teacher, 5, sinks=2)
    count = teacher.config.num_key_value_heads
    ours, theirs = (model.model.layers[0].mixer for model in (student, teacher))
    kept, others = [count - 1], list(range(count - 1))
    for name in "qkv":
        whole = getattr(theirs, f"{name}_proj")
        for part, heads in ((ours.attention, kept), (ours.window, others)):
            own = getattr(part, f"{name}_proj")
            assert torch.equal(own.weight, rows_of(whole.weight, heads, count))
            if whole.bias is not None:
                assert torch.equal(own.bias, rows_of(whole.bias, heads, count))
    for part, heads in ((ours.attention, kept), (ours.window, others)):
        columns = rows_of(theirs.o_proj.weight.T, heads, count).T
        assert torch.equal(part.o_proj.weight, columns)
    hidden, context = teacher.model.enter(ids)
    wanted = theirs.features(hidden, context).unflatten(-1, (count, -1))
    found = ours.attended(hidden, student.model.with_windows(context)).unflatten(-1, (count, -1))
    torch.testing.assert_close(found[..., kept, :], wanted[..., kept, :], rtol=1e-9, atol=1e-9)
    # the first queries see all of the past in the window and its sinks
    torch.testing.assert_close(found[:, :7], wanted[:, :7], rtol=1e-9, atol=1e-9)
    far = (found - wanted)[:, 12:, others].abs().amax((0, 1, 3))
    assert bool((far > 1e-3).all())


@pytest.mark.parametrize("rest", [0.0, 1e-4])
def test_attention_in_it_trains_as_the_rest_does(rest) -> None:
    """Both kinds are the teacher's: aligning leaves them alone. Kept queries and keys stay so."""
    model = shapes_of(tiny_config(["mamba2_mixed", "attention"]))
    for plan in (
        PhasePlan("align", "align", 1, (0,), 2e-3, 0.0),
        PhasePlan("logits", "logits", 1, (0,), 3e-4, rest),
    ):
        rates = {name: rate for names, rate in plan.parameters(model) for name in names}
        wanted = plan.rest_rate or None
        for part in ("attention", "window"):
            assert rates.get(f"model.layers.0.mamba.{part}.v_proj.weight") == wanted
        assert rates.get("model.layers.0.mamba.window.q_proj.weight") == wanted
        assert "model.layers.0.mamba.attention.q_proj.weight" not in rates
        assert rates["model.layers.0.mamba.in_proj.weight"] == plan.mixer_rate
        parts = plan.describe(model, 1)["trained" if wanted else "frozen"]
        assert {"kept heads of mamba mixers", "windows of mamba mixers"} <= {
            part["part"] for part in parts
        }


def test_adapters_act_in_every_projection(make_hybrid, ids) -> None:
    pytest.importorskip("peft", reason='pip install "mambactl[lora]"')
    from mambactl.train.lora import adapted, merged, projections

    model = make_hybrid(["mamba2_mixed"], seed=5)
    names = {f"model.layers.0.mamba.{part}.{n}_proj" for part in PARTS for n in "qkvo"}
    assert names | {"model.layers.0.mamba.in_proj"} <= set(projections(model))
    with torch.no_grad():
        before = model(ids, use_cache=False).logits
        student = adapted(model, SftConfig(lora=2))
        for name, parameter in student.named_parameters():
            if "lora_B" in name and "mamba" in name:
                parameter.fill_(0.05)
        changed = student(ids, use_cache=False).logits
        whole = merged(student)(ids, use_cache=False).logits
    assert float((changed - before).abs().max()) > 0.1
    torch.testing.assert_close(whole, changed, rtol=1e-4, atol=1e-4)


def test_a_mixed_layer_is_aligned_with_the_attention_it_replaces(make_hybrid, ids) -> None:
    teacher = make_hybrid(["attention"] * 3, seed=1).requires_grad_(False)
    student = student_of(teacher, 5, sinks=2)
    objective = AlignmentObjective(student, teacher)
    everything = torch.ones_like(ids, dtype=torch.bool)
    batch = Batch(ids, None, torch.arange(LENGTH).expand_as(ids), everything, everything)
    mixers = [p for n, p in student.named_parameters() if is_new(n)]
    optimizer, losses = torch.optim.SGD(mixers, lr=0.05), []
    for _ in range(4):
        optimizer.zero_grad()
        losses.append(float(objective.backward(batch, objective.count(batch))))
        optimizer.step()
    assert 0 < losses[-1] < losses[0]


@torch.no_grad()
def test_rotary_states_of_replaced_heads_decode_as_they_read(make_hybrid, ids) -> None:
    base = make_hybrid(["attention"] * 2, seed=4)
    form = MixerForm("calibrated", 5, 1, rotary=True, kept=(1,))
    config = base.config.with_layers({0: (MIXED, MIXED.from_attention(base.config, form, 0))})
    assert config.rotates and config.layer(0).settings.mamba2.rotary
    torch.manual_seed(0)
    model = HybridForCausalLM(config).eval()
    cache, pieces = HybridCache(model.config, 2), []
    for piece in ids.split([9, 1, 1, 20, 9], 1):
        pieces.append(model(piece, past_key_values=cache).logits)
    wanted = model(ids, use_cache=False).logits
    torch.testing.assert_close(torch.cat(pieces, 1), wanted, rtol=1e-4, atol=1e-5)


def test_every_part_of_it_learns(make_hybrid, ids) -> None:
    model = make_hybrid(["mamba2_mixed", "attention"], seed=2)
    model(ids, use_cache=False).logits.pow(2).mean().backward()
    still = [name for name, p in model.named_parameters() if not p.grad.abs().max() > 0]
    assert still == []


@torch.no_grad()
def test_bytes_of_the_cache_by_part(make_hybrid, ids) -> None:
    """Keys of kept heads grow, rings and states do not; a step reads what the limit counts."""
    model = make_hybrid(["mamba2_mixed"] * 2, seed=3)
    cache, sizes = HybridCache(model.config, 2), []
    for length in (30, 1):
        model(ids[:, :length], past_key_values=cache)
        layer = cache.layers[0]
        kept = layer.kept.keys[:, :, : int(cache.lengths.max())]
        sizes.append((2 * kept.nbytes, 2 * layer.keys.nbytes, layer.live.nbytes))
    kv, ring, state = zip(*sizes, strict=True)
    # rows, keys and values, one head of 16, fp32; two query heads with states of 16 x 16
    assert kv == (30 * 2 * 2 * 16 * 4, 31 * 2 * 2 * 16 * 4)
    assert set(ring) == {2 * 2 * (7 + 3) * 16 * 4} and set(state) == {2 * 2 * 16 * 16 * 4}
    read = bytes_per_step(model.config, batch=1, context=100, kv_bytes=1).kv
    assert read == 2 * 2 * 16 * (100 + 1 + (7 - 1 + 3) + 1)


def test_caches_of_chosen_rows_are_their_own(make_hybrid, ids) -> None:
    model = make_hybrid(["mamba2_mixed"], seed=3)
    cache = HybridCache(model.config, 2)
    with torch.no_grad():
        model(ids[:, :9], past_key_values=cache)
        before = [tensor.clone() for tensor in cache.layers[0].tensors()]
        other = cache.select(torch.tensor([1]))
        model(ids[1:, 9:12], past_key_values=other)
    assert all(map(torch.equal, before, cache.layers[0].tensors()))
    assert other.layers[0].kept.keys.shape[0] == 1 and len(before) == 6


@pytest.mark.parametrize(
    ("heads", "sizes", "message"),
    [
        ([], (2, 1), "kept_heads"), ([0, 1], (2, 1), "kept_heads"), ([2], (2, 1), "kept_heads"),
        ([-1], (2, 1), "kept_heads"), ("0", (2, 1), "kept_heads"), ([[0]], (2, 1), "kept_heads"),
        ([0], (4, 2), "4 mamba2 heads beside 1 kept KV heads of 2"),
    ],
)  # fmt: skip
def test_settings_that_contradict_the_model(heads, sizes, message) -> None:
    fields = json.loads(tiny_config(["mamba2_mixed"]).to_json_string())
    fields["mamba2"] |= {"n_heads": sizes[0], "x_heads": sizes[1]}
    fields["kept_heads"] = {"heads": heads}
    with pytest.raises(StrictDataclassError, match=message):
        HybridConfig(**fields)


def test_a_configuration_without_kept_heads_says_nothing_of_them() -> None:
    assert "kept_heads" not in tiny_config(["mamba2", "attention"]).to_dict()
    config = tiny_config(["mamba2_mixed", "attention", "mamba2_mixed"])
    again = HybridConfig(**json.loads(config.to_json_string()))
    assert again.layers == config.layers
    assert again.attention_heads == {0: (0,), 1: (0, 1), 2: (1,)}
    assert again.layer(1).spec is ATTENTION
