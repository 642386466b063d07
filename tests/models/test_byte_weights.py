"""Models whose linear layers hold 8 bits: which layers, what they compute, and where that runs."""

import re
from copy import deepcopy

import pytest
import torch

from mambactl.decode.backend import weight_bytes
from mambactl.decode.engine import Engine
from mambactl.decode.equality import float32_logits, next_logits
from mambactl.decode.gpu.fused_engine import FusedEngine
from mambactl.decode.sampler import SamplingParams
from mambactl.errors import ModelError, ResourceError
from mambactl.kernels.byte_matrix import TYPES, rounded_to_bytes
from mambactl.kernels.decode.reference.ops import ReferenceOps
from mambactl.models import byte_weights
from mambactl.models.byte_weights import ByteLinear, for_decoding, round_to_bytes, store_in_bytes
from mambactl.models.key_ring import WindowSettings
from mambactl.models.mixers.settings import Mamba1Settings, Mamba2Settings

SPAN = WindowSettings(window=6, sinks=2)
NATIVE1 = Mamba1Settings(d_inner=40, dt_rank=3, d_state=6, native=True)
BIASED = Mamba2Settings(4, 16, 16, 2, 2, 4, norm_groups=4, proj_bias=True)
MODELS = {
    "attention": {"mixers": ["attention"] * 2, "attention_bias": True},
    "mamba2": {"mixers": ["mamba2"] * 2},
    "mamba1": {"mixers": ["mamba1", "attention"]},
    "native1": {"mixers": ["mamba1"] * 2, "mamba1": NATIVE1, "has_mlp": False},
    "windowed": {"mixers": ["mamba2_window", "attention"], "mamba2_window": SPAN, "mamba2": BIASED},
    "kept heads": {"mixers": ["mamba2_mixed", "attention"], "mamba2_window": SPAN},
}


@pytest.fixture(scope="module", params=["fp8", "int8"])
def kind(request) -> str:
    return request.param


@pytest.fixture(scope="module", params=MODELS)
def models(request, kind, make_hybrid):
    """(as it was, rounded, stored in 8 bits), of the same weights."""
    model = make_hybrid(**MODELS[request.param], seed=11).requires_grad_(False)
    rounded, stored = deepcopy(model), deepcopy(model)
    round_to_bytes(rounded, kind)
    store_in_bytes(stored, kind)
    return model, rounded, stored


@pytest.fixture
def tokens():
    return torch.randint(3, 97, (2, 19), generator=torch.Generator().manual_seed(0))


def test_linear_layers_are_rounded_and_nothing_else(models, kind) -> None:
    model, rounded, stored = models
    modules = dict(stored.named_modules())
    changed = set()
    for (name, before), after in zip(model.named_parameters(), rounded.parameters(), strict=True):
        owner, _, part = name.rpartition(".")
        if isinstance(modules[owner], ByteLinear) and part == "weight":
            changed.add(owner.rpartition(".")[2])
            assert modules[owner].values.dtype == TYPES[kind]
            assert torch.equal(after, rounded_to_bytes(before, kind))
            assert torch.equal(modules[owner].weight.dense(before.dtype), after)
        else:
            assert torch.equal(after, before), name
            assert torch.equal(dict(stored.named_parameters())[name], before), name
    left = {
        name.rpartition(".")[2] for name, each in modules.items() if type(each) is torch.nn.Linear
    }
    assert left <= {"lm_head", "x_proj", "dt_proj"}
    expected = {"in_proj", "out_proj"} if "in_proj" in changed else set()
    expected |= {"q_proj", "k_proj", "v_proj", "o_proj"} if "q_proj" in changed else set()
    if model.config.has_mlp:
        expected |= {"gate_proj", "up_proj", "down_proj"}
    assert changed == expected and changed


def test_stored_weights_compute_what_rounded_ones_do(models, kind, tokens) -> None:
    """Scales of e4m3 are powers of two, so the sums are the same bit for bit; else 1e-4."""
    model, rounded, stored = models
    with torch.no_grad():
        logits = [each(input_ids=tokens).logits for each in models]
    apart = (logits[1] - logits[2]).abs().max() / logits[1].abs().max()
    assert apart == 0 if kind == "fp8" else apart < 1e-4
    assert not torch.equal(logits[0], logits[1])
    assert (logits[0] - logits[1]).abs().max() < 0.5 * logits[0].abs().max()


@pytest.mark.parametrize("k", [0, 3])
def test_engines_decode_with_stored_weights(models, k) -> None:
    """Whole steps with packed weights, and the plain engine that calls modules."""
    _, rounded, stored = models
    prompts = [[5, 6, 7, 5, 6, 7, 5], [9, 4]]
    params = SamplingParams(max_new_tokens=12)
    draft = "ngram" if k else None
    done = FusedEngine(stored, draft, k, ReferenceOps()).generate(prompts, params)
    assert done.tokens == FusedEngine(rounded, draft, k, ReferenceOps()).generate(
        prompts, params
    ).tokens  # fmt: skip
    assert done.tokens == Engine(stored).generate(prompts, params).tokens
    # packing has moved the weights, not changed them
    logits = [next_logits(each, prompts[0]) for each in (rounded, stored)]
    assert torch.allclose(*logits, rtol=0, atol=1e-4 * logits[0].abs().max().item())


def test_stacked_weights_are_held_once(make_hybrid, kind) -> None:
    stored = make_hybrid(["attention", "mamba2_window"], seed=1, mamba2_window=SPAN)
    store_in_bytes(stored.requires_grad_(False), kind)
    engine = FusedEngine(stored, None, 0, ReferenceOps())
    engine.generate([[5, 6, 7]], SamplingParams(max_new_tokens=2))
    packed, _ = engine.packed
    attention, windowed = (layer.mixer for layer in packed.layers)
    own = stored.model.layers[0].self_attn
    assert attention.qkv.weight.values.dtype == TYPES[kind]
    for part in (own.q_proj, own.k_proj, own.v_proj):
        memory = attention.qkv.weight.values.untyped_storage().data_ptr()
        assert part.values.untyped_storage().data_ptr() == memory
    inner = windowed.inner.weight
    window = stored.model.layers[1].mixer.window
    assert len(inner) > len(windowed.window.qkv.weight)
    memory = inner.values.untyped_storage().data_ptr()
    assert window.k_proj.values.untyped_storage().data_ptr() == memory
    assert windowed.window.qkv.weight.values.untyped_storage().data_ptr() == memory


def test_rounding_of_logits_is_measured_with_stored_weights(make_hybrid, kind) -> None:
    """The float32 logits that `spec-decode --check` compares with use the stored weights."""
    stored = make_hybrid(["mamba2", "attention"], seed=3).requires_grad_(False)
    rounded = deepcopy(stored)
    store_in_bytes(stored, kind)
    round_to_bytes(rounded, kind)
    exact = [float32_logits(each, [5, 6, 7]) for each in (stored, rounded)]
    assert torch.allclose(*exact, rtol=0, atol=1e-4 * exact[0].abs().max().item())


def test_bytes_saved_and_read(make_hybrid, kind) -> None:
    model = make_hybrid(["mamba2", "attention"], seed=3).to(torch.bfloat16).requires_grad_(False)
    engine = Engine(model)
    assert weight_bytes(engine, model) == 2
    before = sum(parameter.nbytes for parameter in model.parameters())
    count = sum(each.weight.numel() for *_, each in byte_weights.linears(model))
    rows = sum(each.out_features for *_, each in byte_weights.linears(model))
    saved = store_in_bytes(model, kind)
    assert saved == count - 4 * rows
    assert sum(parameter.nbytes for parameter in model.parameters()) == before - saved
    assert 1 < weight_bytes(engine, model) < 2


def test_rows_that_kernels_cannot_read_are_refused(make_hybrid, kind) -> None:
    odd = Mamba1Settings(d_inner=38, dt_rank=3, d_state=6, native=True)
    model = make_hybrid(["mamba1"], seed=3, mamba1=odd, has_mlp=False)
    before = {name: t.clone() for name, t in model.named_parameters()}
    with pytest.raises(ModelError, match="rows of a multiple of 4 numbers, here some have 38"):
        store_in_bytes(model, kind)
    assert all(torch.equal(t, before[name]) for name, t in model.named_parameters())


@pytest.mark.parametrize(
    ("weights", "capability", "least"),
    [("fp8", (8, 0), "8.9"), ("fp8", (8, 6), "8.9"), ("int8", (7, 5), "8.0")],
)
def test_older_gpus_are_refused(monkeypatch, weights, capability, least) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    sentence = f"{weights} weights need a GPU of compute capability {least}, cuda:1 has"
    with pytest.raises(ResourceError, match=re.escape(sentence)):
        byte_weights.require_weights(weights, torch.device("cuda:1"))
    byte_weights.require_weights("auto", torch.device("cuda:1"))


@pytest.mark.parametrize("capability", [(8, 9), (9, 0), (12, 0)])
def test_newer_gpus_are_not(monkeypatch, capability) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    byte_weights.require_weights("fp8", torch.device("cuda"))
    byte_weights.require_weights("int8", torch.device("cuda"))


def test_a_cpu_keeps_rounded_weights(make_hybrid, kind, capsys) -> None:
    model = make_hybrid(["mamba2"], seed=3).requires_grad_(False)
    rounded = deepcopy(model)
    round_to_bytes(rounded, kind)
    assert for_decoding(model, "auto") is model
    assert kind not in capsys.readouterr().err
    assert for_decoding(model, kind, "t.st") is model
    assert all(map(torch.equal, model.parameters(), rounded.parameters()))
    told = capsys.readouterr().err
    assert (
        f"t.st: weights rounded to {kind}; a CPU keeps them in float32, so no memory is saved"
        in told
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", MODELS)
def test_gpu_logits_are_those_of_rounded_weights(make_hybrid, name, kind, capsys) -> None:
    """In bf16, prompts of few and of many tokens: as near to fp64 as dense layers in bf16 are.

    Root mean squares of the differences; those of two orders of rounding vary by less than a half.
    """
    settings = {"mamba2": BIASED} if "mamba1" not in name else {}
    model = make_hybrid(**{**MODELS[name], **settings}, seed=11).requires_grad_(False)
    model = model.to("cuda", torch.bfloat16)
    rounded = deepcopy(model)
    round_to_bytes(rounded, kind)
    # of bf16 weights whose rounding to bytes is not rounded to bf16 again
    exact = deepcopy(model).double()
    round_to_bytes(exact, kind)
    for_decoding(model, kind)
    assert "saved" in capsys.readouterr().err
    g = torch.Generator().manual_seed(0)
    for batch, length in ((1, 1), (2, 9), (3, 40), (5, 100)):
        ids = torch.randint(3, 97, (batch, length), generator=g).cuda()
        with torch.no_grad():
            logits, dense, expected = (
                each(input_ids=ids).logits.double() for each in (model, rounded, exact)
            )
        error, common = ((each - expected).square().mean().sqrt() for each in (logits, dense))
        assert error <= 1.5 * common
