"""Initial values of new mixers: copied rows, the paper's draws, and calibrated attention."""

import math
from dataclasses import replace

import pytest
import torch
from conversion.mixers import apply_fit, initialise
from torch import Tensor
from transformers import LlamaForCausalLM

from mambactl.models.config import HybridConfig
from mambactl.models.hybrid import HybridForCausalLM
from mambactl.models.mixers import from_attention
from mambactl.models.mixers.from_attention import LINEAR_RANGE, inverse_silu, prior_fit
from mambactl.models.mixers.mamba1 import mamba1_from_attention
from mambactl.models.mixers.mamba2 import Mamba2Mixer, mamba2_from_attention
from mambactl.models.mixers.spec import AttentionWeights, HeadFit

MIXERS = ["mamba2", "mamba1"]
METHODS = ["reference", "calibrated"]
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 16
INNER, SHARED = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
# rows of in_proj
ROWS = {
    "z": slice(0, INNER),
    "x": slice(INNER, INNER + SHARED),
    "B": slice(INNER + SHARED, INNER + 2 * SHARED),
    "C": slice(INNER + 2 * SHARED, 2 * INNER + 2 * SHARED),
    "dt": slice(2 * INNER + 2 * SHARED, None),
}


def weights_of(layer, norm: Tensor) -> AttentionWeights:
    projections = {name: getattr(layer, f"{name}_proj") for name in "qkvo"}
    biases = {n: p.bias.data for n, p in projections.items() if p.bias is not None}
    return AttentionWeights(
        **{name: p.weight.data for name, p in projections.items()}, norm=norm, biases=biases or None
    )


@pytest.fixture(scope="module")
def teacher(tiny_llama_dir):
    """The four attention layers of a Llama that the library made."""
    model = LlamaForCausalLM.from_pretrained(tiny_llama_dir)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.input_layernorm.weight.uniform_(0.5, 1.5)
    return model


@pytest.fixture
def new_mixers():
    """new_mixers(kind, config, proj_bias=True) -> freshly built mixers of every layer."""

    def build(kind: str, config, proj_bias: bool = True) -> list[torch.nn.Module]:
        fields = {k: v for k, v in config.to_dict().items() if k != "model_type"}
        base = HybridConfig(**fields)
        settings = {
            "mamba2": mamba2_from_attention(base, proj_bias),
            "mamba1": mamba1_from_attention(base, HEAD_DIM, proj_bias),
        }
        student = base.with_mixers([kind] * config.num_hidden_layers, **settings)
        return [layer.mixer for layer in HybridForCausalLM(student).model.layers]

    return build


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", MIXERS)
def test_projections_are_the_teachers_bit_for_bit(teacher, new_mixers, kind, method, stored):
    mixers = new_mixers(kind, teacher.config)
    assert len(mixers) == 4
    for layer, mixer in zip(teacher.model.layers, mixers, strict=True):
        attention, generator = layer.self_attn, torch.Generator().manual_seed(0)
        weights = weights_of(attention, layer.input_layernorm.weight.data)
        cast = AttentionWeights(*(getattr(weights, n).to(stored) for n in (*"qkvo", "norm")))
        initialise(mixer, cast, method, generator)
        for section, name in (("x", "v"), ("B", "k"), ("C", "q")):
            source = getattr(attention, f"{name}_proj").weight.to(stored)
            assert torch.equal(mixer.in_proj.weight[ROWS[section]].to(stored), source)
            assert (mixer.in_proj.bias[ROWS[section]] == 0).all()
        assert torch.equal(mixer.out_proj.weight.to(stored), attention.o_proj.weight.to(stored))
        assert all(p.isfinite().all() for p in mixer.parameters())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", MIXERS)
def test_attention_biases_are_copied(make_hybrid, new_mixers, kind, method) -> None:
    model = make_hybrid(["attention"], attention_bias=True)
    layer = model.model.layers[0]
    (mixer,) = new_mixers(kind, model.config)
    weights = weights_of(layer.mixer, layer.input_layernorm.weight.data)
    initialise(mixer, weights, method, torch.Generator().manual_seed(0))
    for section, name in (("x", "v"), ("B", "k"), ("C", "q")):
        source = getattr(layer.mixer, f"{name}_proj").bias
        assert source.abs().max() > 0
        assert torch.equal(mixer.in_proj.bias[ROWS[section]], source)
    assert torch.equal(mixer.out_proj.bias, layer.mixer.o_proj.bias)


def reference_mixer(teacher, new_mixers, kind: str, seed: int = 0):
    layer = teacher.model.layers[0]
    mixer = new_mixers(kind, teacher.config, proj_bias=False)[0]
    weights = weights_of(layer.self_attn, layer.input_layernorm.weight.data)
    initialise(mixer, weights, "reference", torch.Generator().manual_seed(seed))
    return mixer


@pytest.mark.parametrize("kind", MIXERS)
def test_reference_draws_are_those_of_pytorch_and_mamba(teacher, new_mixers, kind) -> None:
    mixer = reference_mixer(teacher, new_mixers, kind)
    bound = teacher.config.hidden_size**-0.5
    drawn = [(mixer.in_proj.weight[ROWS["z"]], bound), (mixer.in_proj.weight[ROWS["dt"]], bound)]
    drawn += [(mixer.conv1d.weight, 0.5), (mixer.conv1d.bias, 0.5)]
    if kind == "mamba1":
        drawn.append((mixer.dt_proj.weight, mixer.sizes.dt_rank**-0.5))
    for tensor, limit in drawn:
        assert tensor.abs().max() <= limit
        assert tensor.abs().max() > 0.9 * limit
        assert tensor.mean().abs() < 0.2 * limit
    assert (mixer.D == 1).all()


def test_reference_steps_and_decays_of_mamba2(teacher, new_mixers) -> None:
    mixers = [reference_mixer(teacher, new_mixers, "mamba2", seed) for seed in range(30)]
    dt = torch.stack([torch.nn.functional.softplus(m.dt_bias) for m in mixers])
    rate = torch.stack([m.A_log.exp() for m in mixers])
    assert dt.min() >= 0.999e-3 and dt.max() <= 0.1001
    assert dt.log().mean().item() == pytest.approx(math.log(1e-2), abs=0.4)
    assert rate.min() >= 1 and rate.max() <= 16.001
    assert rate.mean().item() == pytest.approx(8.5, abs=1.5)
    assert (mixers[0].norm.weight == 1).all()


def test_reference_steps_and_decays_of_mamba1(teacher, new_mixers) -> None:
    mixers = [reference_mixer(teacher, new_mixers, "mamba1", seed) for seed in range(3)]
    bias = torch.stack([m.dt_proj.bias for m in mixers])
    # the public layer adds the bias twice, so half of it is the inverse of the drawn dt
    dt = torch.nn.functional.softplus(bias / 2)
    assert dt.min() >= 0.999e-3 and dt.max() <= 0.1001
    assert torch.nn.functional.softplus(bias).median() < 1e-3
    steps = torch.arange(1, 17).float().log()
    assert torch.equal(mixers[0].A_log, steps.expand(HEADS * HEAD_DIM, 16))


@pytest.mark.parametrize("kind", MIXERS)
def test_reference_depends_on_the_generator_only(teacher, new_mixers, kind) -> None:
    one, same, other = (reference_mixer(teacher, new_mixers, kind, seed) for seed in (0, 0, 1))
    for (name, a), b in zip(one.named_parameters(), same.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert not torch.equal(one.conv1d.weight, other.conv1d.weight)


def hidden_of(length: int, norm: Tensor) -> Tensor:
    """Normed inputs [1, T, D] of unit variance, times the norm's weight."""
    draw = torch.randn(1, length, len(norm), generator=torch.Generator().manual_seed(5))
    return draw / draw.pow(2).mean(-1, keepdim=True).sqrt() * norm


def decayed_attention(hidden: Tensor, w: AttentionWeights, fit: HeadFit, first: int) -> Tensor:
    """o_t = sum_s 2^(-(t-s)/h) (c + a q_t.k_s / sqrt(P)) v_s + d v_t in fp64, [T, H, P].

    Scores leave out the first `first` channels of a head.
    """
    q, k, v = (
        (hidden[0].double() @ getattr(w, n).double().T).unflatten(-1, (-1, HEAD_DIM)) for n in "qkv"
    )
    k, v = (t.repeat_interleave(HEADS // KV_HEADS, 1) for t in (k, v))
    age = torch.arange(len(q))[:, None] - torch.arange(len(q))  # [T, S]
    decay = (2.0 ** (-age / fit.half_life.double()[:, None, None])) * (age >= 0)  # [H, T, S]
    score = torch.einsum("thp,shp->hts", q[..., first:], k[..., first:]) / math.sqrt(HEAD_DIM)
    weight = fit.constant.double()[:, None, None] + fit.score.double()[:, None, None] * score
    mixed = torch.einsum("hts,shp->thp", decay * weight, v)
    return mixed + fit.skip.double()[:, None] * v


@pytest.fixture
def attention(make_hybrid) -> AttentionWeights:
    layer = make_hybrid(["attention"], seed=4).model.layers[0]
    return weights_of(layer.mixer, layer.input_layernorm.weight.data)


FITS = {
    "constant": {"constant": [0.2, 0.05, -0.1, 0.3], "score": [1e-4] * 4, "skip": [0.0] * 4},
    "score": {"constant": [0.05] * 4, "score": [0.3, 0.5, -0.4, 0.2], "skip": [0.0] * 4},
    "skip": {"constant": [0.05] * 4, "score": [0.01] * 4, "skip": [0.5, -0.3, 1.0, 0.2]},
    "all": {
        "constant": [0.1, -0.1, 0.2, 0.05],
        "score": [0.1, 0.3, -0.2, 0.1],
        "skip": [0.5, 0, -1, 1],
    },
}
SHORT, LONG = [1.5, 3.0, 6.0, 12.0], [2.0, 8.0, 30.0, 1e5]


def build(config, kind: str, new_mixers, attention: AttentionWeights):
    (mixer,) = new_mixers(kind, config)
    initialise(mixer, attention, "calibrated", torch.Generator().manual_seed(0))
    return mixer


def calibrated_errors(mixer, model, attention, half_lives: list[float], terms: dict) -> Tensor:
    """Relative error [H] of the head outputs of a fitted mixer against the formula."""
    fit = HeadFit(
        half_life=torch.tensor(half_lives), rms=torch.ones(HEADS),
        **{name: torch.tensor(values) for name, values in terms.items()},
    )  # fmt: skip
    hidden = hidden_of(120, attention.norm)
    # in Mamba-2 the first channel of a head holds the constant, so scores are without it
    first = 1 if isinstance(mixer, Mamba2Mixer) else 0
    expected = decayed_attention(hidden, attention, fit, first)  # [T, H, P]
    rms = expected.pow(2).mean((0, 2)).sqrt().float()
    apply_fit(mixer, attention, replace(fit, rms=rms))
    with torch.no_grad():
        hidden = hidden.to(mixer.out_proj.weight.dtype)
        actual = mixer.features(hidden, model.model.context(hidden))[0].unflatten(-1, (HEADS, -1))
    return (actual - expected).norm(dim=(0, 2)) / expected.norm(dim=(0, 2))


@pytest.mark.parametrize("terms", FITS)
def test_calibrated_mamba2_is_decayed_linear_attention(
    make_hybrid, new_mixers, attention, terms
) -> None:
    model = make_hybrid(["attention"], seed=4)
    mixer = build(model.config, "mamba2", new_mixers, attention)
    errors = calibrated_errors(mixer, model, attention, SHORT, FITS[terms])
    assert errors.max() < 0.15
    assert errors.mean() < 0.11


@pytest.mark.parametrize("half_lives", [SHORT, LONG], ids=["short", "long"])
@pytest.mark.parametrize("terms", FITS)
def test_calibrated_mamba2_is_exact_in_the_limit_of_small_arguments(
    make_hybrid, new_mixers, attention, monkeypatch, terms, half_lives
) -> None:
    """The rest of the error is SiLU's and the norm's curvature: it vanishes with their range."""
    monkeypatch.setattr(from_attention, "LINEAR_RANGE", from_attention.LINEAR_RANGE / 100)
    monkeypatch.setattr(from_attention, "NORM_RANGE", from_attention.NORM_RANGE / 100**3)
    model = make_hybrid(["attention"], seed=4)
    mixer = build(model.config, "mamba2", new_mixers, attention).double()
    errors = calibrated_errors(mixer, model, attention, half_lives, FITS[terms])
    assert errors.max() < 0.004


@pytest.mark.parametrize("skip", [0.0, 0.5])
def test_calibrated_mamba1_is_decayed_linear_attention(
    make_hybrid, new_mixers, attention, skip
) -> None:
    model = make_hybrid(["attention"], seed=4)
    mixer = build(model.config, "mamba1", new_mixers, attention)
    terms = {"constant": [0.0] * 4, "score": [0.05, 0.3, 0.1, 0.02], "skip": [skip] * 4}
    assert calibrated_errors(mixer, model, attention, LONG, terms).max() < 0.05


@pytest.mark.parametrize("kind", MIXERS)
def test_calibrated_gate_is_one_for_every_input(make_hybrid, new_mixers, attention, kind) -> None:
    mixer = build(make_hybrid(["attention"]).config, kind, new_mixers, attention)
    hidden = 10 * hidden_of(20, attention.norm)
    z = mixer.in_proj(hidden)[..., ROWS["z"]]
    gate = torch.nn.functional.silu(z)
    torch.testing.assert_close(gate, torch.ones_like(gate), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", MIXERS)
def test_calibrated_steps_do_not_depend_on_the_input(
    make_hybrid, new_mixers, attention, kind
) -> None:
    mixer = build(make_hybrid(["attention"]).config, kind, new_mixers, attention)
    low = mixer.in_proj(hidden_of(20, attention.norm))[..., ROWS["dt"]]
    dt = mixer.dt_proj(low) if kind == "mamba1" else low + mixer.dt_bias
    assert (dt == dt[:, :1]).all()
    # Mamba-1 must still be able to learn it
    assert kind == "mamba2" or low.std() > 0


def test_prior_has_the_rms_it_promises(make_hybrid, new_mixers, attention) -> None:
    mixer = build(make_hybrid(["attention"]).config, "mamba2", new_mixers, attention)
    fit = prior_fit(mixer.sizes.n_heads, mixer.sizes.head_dim, attention)
    hidden = hidden_of(512, attention.norm)
    v = (hidden @ attention.v.T).unflatten(-1, (KV_HEADS, -1)).pow(2).mean((0, 1, 3)).sqrt()
    torch.testing.assert_close(fit.rms, 0.13 * v.repeat_interleave(2), rtol=0.05, atol=0)
    assert fit.half_life.tolist() == [3.0, 12.0, 48.0, 1.5]
    for half_life, constant in zip(fit.half_life.tolist(), fit.constant.tolist(), strict=True):
        total = sum(0.5 ** (age / half_life) for age in range(512))
        assert constant * total == pytest.approx(0.4, rel=1e-4)


def test_taps_keep_silu_in_its_linear_range(make_hybrid, new_mixers, attention) -> None:
    mixer = build(make_hybrid(["attention"]).config, "mamba2", new_mixers, attention)
    inner = mixer.in_proj(hidden_of(400, attention.norm))[..., ROWS["x"].start : ROWS["C"].stop]
    arguments = inner * mixer.conv1d.weight[:, 0, -1]
    x_and_b = arguments[..., : 2 * KV_HEADS * HEAD_DIM]
    rms = x_and_b.unflatten(-1, (-1, HEAD_DIM)).pow(2).mean((0, 1, 3)).sqrt()
    torch.testing.assert_close(rms, torch.full_like(rms, LINEAR_RANGE), rtol=0.1, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inverse_silu_inverts(dtype) -> None:
    y = torch.tensor([0, 1e-6, 1e-3, 0.1, 0.5, 1, 3, 20, 1e3], dtype=dtype)
    x = inverse_silu(y)
    assert x.dtype == dtype and (x >= 0).all()
    torch.testing.assert_close(torch.nn.functional.silu(x), y)
    assert inverse_silu(torch.tensor(1.0)).item() == pytest.approx(1.2784645, abs=1e-6)
