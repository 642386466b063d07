"""The closed-form fit: it finds what is there, never uses padding, and never makes things worse."""

import math

import pytest
import torch
from conversion.mixers import fitted, heads_of, initialise

from mambactl.conversion import fit as fitting
from mambactl.conversion.fit import (
    HALF_LIVES,
    Problem,
    Streams,
    fit_mixer,
)
from mambactl.data.pack import Batch, collate
from mambactl.kernels.reference import rotate_states
from mambactl.models.mixers.attention import weights_of
from mambactl.models.mixers.registry import spec_of
from mambactl.models.mixers.spec import AttentionWeights

MIXERS = ("mamba2", "mamba1")
# kind of mixer, and whether its states turn with the position
FORMS = [("mamba2", False), ("mamba2", True), ("mamba1", False)]
HEADS, KV_HEADS, HEAD_DIM, WIDTH = 4, 2, 16, 48


@pytest.fixture
def new_mixer(make_hybrid):
    """new_mixer(kind, attention, rotary=False) -> a calibrated mixer before any data."""

    def make(kind: str, attention: AttentionWeights, rotary: bool = False) -> torch.nn.Module:
        settings = {name: sizes(name, rotary) for name in MIXERS}
        mixer = make_hybrid([kind], **settings).model.layers[0].mixer.requires_grad_(False)
        initialise(mixer, attention, "calibrated", torch.Generator())
        return mixer

    return make


def sizes(kind: str, rotary: bool = False):
    from conftest import tiny_config

    from mambactl.models.mixers.mamba1 import mamba1_from_attention
    from mambactl.models.mixers.mamba2 import mamba2_from_attention

    base = tiny_config(["attention"])
    if kind == "mamba2":
        return mamba2_from_attention(base, proj_bias=True, rotary=rotary)
    return mamba1_from_attention(base, HEAD_DIM, proj_bias=True)


def random_attention(bias: bool = False) -> AttentionWeights:
    """Projections for inputs of unit variance, with scores of order one."""
    draw = torch.Generator().manual_seed(0)
    rows = {"q": HEADS * HEAD_DIM, "k": KV_HEADS * HEAD_DIM, "v": KV_HEADS * HEAD_DIM}
    parts = {n: torch.randn(r, WIDTH, generator=draw) * WIDTH**-0.5 for n, r in rows.items()}
    parts["o"] = torch.randn(WIDTH, rows["q"], generator=draw) * rows["q"] ** -0.5
    biases = {n: 0.5 * torch.randn(r, generator=draw) for n, r in rows.items()}
    biases["o"] = torch.randn(WIDTH, generator=draw)
    return AttentionWeights(**parts, norm=torch.ones(WIDTH), biases=biases if bias else None)


def packed_batches(draw: torch.Generator, rows: int, length: int = 128) -> list[Batch]:
    """Batches of two rows, each of two documents and padding of its own length."""
    made = []
    for _ in range(rows // 2):
        first, used = (torch.randint(low, high, (2, 1), generator=draw) for low, high in
                       ((length // 4, length // 2), (length * 3 // 4, length)))  # fmt: skip
        steps = torch.arange(length).expand(2, -1)
        seq_idx = (steps >= first).int() + (steps >= used).int()
        starts = torch.where(seq_idx == 0, 0, torch.where(seq_idx == 1, first, used))
        ids = torch.randint(3, 97, (2, length), generator=draw)
        valid = steps < used
        made.append(Batch(ids, seq_idx, steps - starts, valid, valid))
    return made


def decayed_attention(
    attention: AttentionWeights, hidden: torch.Tensor, batch: Batch, fit: dict, rotary: bool
) -> torch.Tensor:
    """Heads [B, T, H P] of decayed linear attention as a full matrix over all pairs of tokens.

    A fit with a constant is Mamba-2's, which gives channel 0 of every query to that constant.
    """
    seq_idx = batch.seq_idx
    biases = attention.biases or {}
    q, k, v = (
        torch.nn.functional.linear(hidden, getattr(attention, n), biases.get(n))
        .unflatten(-1, (-1, HEAD_DIM))
        .transpose(1, 2)
        for n in "qkv"
    )  # [B, heads, T, P]
    if any(fit["constant"]):
        q[..., 0] = 0
    if rotary:
        angles = rotations(batch.position_ids)
        q, k = (rotate_states(t.transpose(1, 2), angles).transpose(1, 2) for t in (q, k))
    k, v = (t.repeat_interleave(HEADS // KV_HEADS, 1) for t in (k, v))
    steps = torch.arange(hidden.shape[1])
    gap = steps[:, None] - steps
    seen = (gap >= 0) & (seq_idx[:, None, :, None] == seq_idx[:, None, None, :])
    half_life, constant, score, skip = (
        torch.tensor(fit[n]).view(HEADS, 1, 1) for n in ("half_life", "constant", "score", "skip")
    )
    weight = torch.where(seen, 0.5 ** (gap.clamp(min=0) / half_life), 0)  # [B, H, T, T]
    pairs = constant + score * (q @ k.mT) / math.sqrt(HEAD_DIM)
    return ((weight * pairs) @ v + skip * v).transpose(1, 2).flatten(2)


def rotations(positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(cos, sin) [B, T, P], the slowest pair a full turn in some 40 tokens."""
    speeds = 0.5 ** torch.arange(HEAD_DIM // 2).clamp(max=3).repeat(2) * 1.2
    angles = positions[..., None] * speeds
    return angles.cos(), angles.sin()


def decayed_problem(
    attention: AttentionWeights, fit: dict, seed: int, rows: int = 8, rotary: bool = False
) -> Problem:
    draw = torch.Generator().manual_seed(seed)
    batches = packed_batches(draw, rows)
    inputs = [torch.randn(*b.input_ids.shape, WIDTH, generator=draw) for b in batches]
    heads = [
        decayed_attention(attention, u, b, fit, rotary)
        for u, b in zip(inputs, batches, strict=True)
    ]
    bias = (attention.biases or {}).get("o")
    targets = [torch.nn.functional.linear(h, attention.o, bias) for h in heads]
    return Problem(inputs, contexts(batches), [b.valid for b in batches], heads, targets)


def contexts(batches: list[Batch]) -> list:
    from mambactl.models.mixers.spec import StepContext

    return [
        StepContext(b.position_ids, rotations(b.position_ids), None, b.seq_idx) for b in batches
    ]


def output_error(mixer: torch.nn.Module, problem: Problem) -> float:
    """Squared error over the variance of the target, on valid tokens."""
    error = spread = 0.0
    for u, context, mask, wanted in zip(
        problem.inputs, problem.contexts, problem.masks, problem.targets, strict=True
    ):
        wanted = wanted[mask]
        error += float((mixer(u, context, None)[mask] - wanted).square().sum())
        spread += float((wanted - wanted.mean(0)).square().sum())
    return error / spread


MAMBA2_FIT = {
    "half_life": [3.0, 24.0, 1.5, 1e5],
    "constant": [0.3, -0.1, 0.0, 0.05],
    "score": [0.2, 0.1, -0.4, 0.05],
    "skip": [0.5, -0.3, 0.0, 1.0],
}
# without a constant, and with scores that a positive dt can give
MAMBA1_FIT = {**MAMBA2_FIT, "constant": [0.0] * 4, "score": [0.2, 0.1, 0.4, 0.05]}
FITS = {"mamba2": MAMBA2_FIT, "mamba1": MAMBA1_FIT}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("kind", "rotary"), FORMS)
def test_known_heads_are_recovered(new_mixer, kind, rotary, bias) -> None:
    attention = random_attention(bias)
    wanted = FITS[kind]
    problem = decayed_problem(attention, wanted, 1, rotary=rotary)
    fit = heads_of(new_mixer(kind, attention, rotary), attention, problem)
    assert fit.half_life.tolist() == wanted["half_life"]
    # Mamba-1's own SiLU is in its features already
    close = 5e-3 if kind == "mamba2" else 3e-2
    for name in ("constant", "score", "skip"):
        found = getattr(fit, name)
        torch.testing.assert_close(found, torch.tensor(wanted[name]), rtol=close, atol=close)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("kind", "rotary"), FORMS)
def test_what_is_decayed_linear_attention_is_fitted(new_mixer, kind, rotary, bias) -> None:
    attention = random_attention(bias)
    mixer = new_mixer(kind, attention, rotary)
    unseen = decayed_problem(attention, FITS[kind], 2, rotary=rotary)
    assert output_error(mixer, unseen) > 0.3
    report = fitted(mixer, attention, decayed_problem(attention, FITS[kind], 1, 32, rotary))
    assert report.half_lives == FITS[kind]["half_life"]
    assert report.after_refit <= report.before_refit < 0.05
    assert report.after_refit < 0.02
    assert output_error(mixer, unseen) < 0.02


def test_heads_have_the_scale_of_least_error(new_mixer) -> None:
    """Norm and SiLU are only nearly linear; what they take from a head's size is given back."""
    attention = random_attention()
    problem = decayed_problem(attention, MAMBA2_FIT, 1)
    mixer = new_mixer("mamba2", attention)
    fitted(mixer, attention, problem)
    made, wanted = [], []
    for u, context, mask, heads in zip(
        problem.inputs, problem.contexts, problem.masks, problem.heads, strict=True
    ):
        made.append(mixer.features(u, context)[mask].unflatten(-1, (HEADS, -1)))
        wanted.append(heads[mask].unflatten(-1, (HEADS, -1)))
    made, wanted = torch.cat(made), torch.cat(wanted)
    best = (made * wanted).sum((0, 2)) / made.square().sum((0, 2))
    torch.testing.assert_close(best, torch.ones(HEADS), rtol=1e-4, atol=0)


@pytest.mark.parametrize("kind", MIXERS)
def test_a_shift_of_the_target_becomes_the_bias(new_mixer, kind) -> None:
    attention, shift = random_attention(), torch.linspace(-2, 2, WIDTH)
    clean = decayed_problem(attention, FITS[kind], 1)
    moved = [t + shift for t in clean.targets]
    mixer = new_mixer(kind, attention)
    report = fitted(
        mixer, attention, Problem(clean.inputs, clean.contexts, clean.masks, clean.heads, moved)
    )
    assert report.after_refit < 0.02 < report.before_refit
    # the ridge holds a little back
    torch.testing.assert_close(mixer.out_proj.bias, shift, rtol=0, atol=0.15)


def test_a_score_that_mamba1_cannot_have_leaves_the_skip(new_mixer) -> None:
    attention = random_attention()
    wanted = {**MAMBA1_FIT, "score": [-0.2, 0.1, -0.4, 0.05]}
    mixer = new_mixer("mamba1", attention)
    fit = heads_of(mixer, attention, decayed_problem(attention, wanted, 1))
    assert fit.score[0] == fit.score[2] == 0
    torch.testing.assert_close(fit.score[1::2], torch.tensor([0.1, 0.05]), rtol=0.03, atol=0.01)
    # without its score a head is best off with the mean part of both
    problem = decayed_problem(attention, wanted, 1)
    v = torch.cat(
        [(u @ attention.v.T)[m] for u, m in zip(problem.inputs, problem.masks, strict=True)]
    )[:, :HEAD_DIM]
    y = torch.cat([h[m] for h, m in zip(problem.heads, problem.masks, strict=True)])[:, :HEAD_DIM]
    torch.testing.assert_close(fit.skip[0], (v * y).sum() / (v * v).sum())


@pytest.mark.parametrize("kind", MIXERS)
def test_padding_never_influences_the_fit(new_mixer, kind) -> None:
    attention = random_attention()
    clean = decayed_problem(attention, FITS[kind], 1)
    states = []
    for value in (None, 3e3):
        # a fit writes into nothing it was given
        problem = clean if value is None else poisoned(clean, value)
        mixer = new_mixer(kind, attention)
        report = fitted(mixer, attention, problem)
        states.append((report, mixer.state_dict()))
    assert states[0][0] == states[1][0]
    for name, tensor in states[0][1].items():
        assert torch.equal(tensor, states[1][1][name]), name


def poisoned(problem: Problem, value: float) -> Problem:
    """The same with `value` at every padded position of inputs, heads and targets."""
    assert all(not mask.all() for mask in problem.masks)
    filled = {
        name: [
            t.masked_fill(~mask[..., None], value)
            for t, mask in zip(getattr(problem, name), problem.masks, strict=True)
        ]
        for name in ("inputs", "heads", "targets")
    }
    return Problem(contexts=problem.contexts, masks=problem.masks, **filled)


@pytest.mark.parametrize("kind", MIXERS)
def test_noise_is_not_fitted(new_mixer, kind) -> None:
    """The refit of out_proj is refused where it does not help on the rows held out."""
    attention = random_attention()
    refused = 0
    for seed in range(4):
        draw = torch.Generator().manual_seed(100 + seed)
        clean = decayed_problem(attention, FITS[kind], seed, rows=4)
        noise = [h + torch.randn(h.shape, generator=draw) for h in clean.targets]
        problem = Problem(clean.inputs, clean.contexts, clean.masks, clean.heads, noise)
        mixer = new_mixer(kind, attention)
        report = fitted(mixer, attention, problem)
        assert report.after_refit <= report.before_refit
        if report.ridge is None:
            refused += 1
            assert report.after_refit == report.before_refit
            assert torch.equal(mixer.out_proj.weight, attention.o)
            assert not mixer.out_proj.bias.any()
    assert refused > 0


def test_the_ridge_is_the_best_of_those_tried(new_mixer, monkeypatch) -> None:
    attention = random_attention()
    draw = torch.Generator().manual_seed(7)
    clean = decayed_problem(attention, MAMBA2_FIT, 1, rows=6)
    noise = [t + 0.5 * torch.randn(t.shape, generator=draw) for t in clean.targets]
    # another out_proj than the one the mixer starts with
    rotated = [t.roll(1, -1) for t in noise]
    problem = Problem(clean.inputs, clean.contexts, clean.masks, clean.heads, rotated)

    def fit(strengths: tuple[float, ...]):
        monkeypatch.setattr(fitting, "RIDGE", strengths)
        return fitted(new_mixer("mamba2", attention), attention, problem)

    every = fit((0.003, 0.03, 0.3, 3.0))
    errors = {s: fit((s,)).after_refit for s in (0.003, 0.03, 0.3, 3.0)}
    assert every.ridge == min(errors, key=errors.__getitem__)
    assert every.after_refit == min(errors.values()) < every.before_refit


@pytest.fixture
def trained_pair(make_hybrid):
    """pair(kind) -> (teacher, student): two replaced layers of four, the student not yet fitted."""

    def make(kind: str):
        teacher = make_hybrid(["attention"] * 4, seed=3).requires_grad_(False)
        mixers = ["attention", kind, kind, "attention"]
        settings = {kind: sizes(kind) for kind in MIXERS}
        student = make_hybrid(mixers, seed=4, **settings).requires_grad_(False)
        shared = {k: v for k, v in teacher.state_dict().items() if k in student.state_dict()}
        student.load_state_dict(shared, strict=False)
        for ours, theirs in zip(student.model.layers, teacher.model.layers, strict=True):
            if ours.mixer_name == "mamba":
                weights = weights_of(theirs.mixer, theirs.input_layernorm.weight)
                initialise(ours.mixer, weights, "calibrated", torch.Generator())
        return teacher, student

    return make


def walk(teacher, student, batches: list[Batch]) -> list:
    """Fit every replaced layer of the student in place."""
    streams = Streams(teacher.model, teacher.model.embed_tokens.weight, batches)
    reports = []
    for ours, theirs in zip(student.model.layers, teacher.model.layers, strict=True):
        if ours.mixer_name == "mamba":
            reports.append(streams.replace(theirs, ours, spec_of(ours.mixer)))
        else:
            streams.keep(ours)
    return reports


def hidden_states(model, batch: Batch) -> tuple[torch.Tensor, ...]:
    return model.model(
        batch.input_ids, position_ids=batch.position_ids, seq_idx=batch.seq_idx,
        use_cache=False, output_hidden_states=True,
    ).hidden_states  # fmt: skip


def mixer_errors(teacher, student, batches: list[Batch]) -> list[float]:
    """Error of each new mixer's output on the student's own stream, as the fit defines it."""
    errors = []
    for layer, (ours, theirs) in enumerate(
        zip(student.model.layers, teacher.model.layers, strict=True)
    ):
        if ours.mixer_name != "mamba":
            continue
        inputs, targets, indices = [], [], []
        for batch in batches:
            own, wanted = (hidden_states(m, batch)[layer] for m in (student, teacher))
            context = teacher.model.context(wanted, batch.position_ids, seq_idx=batch.seq_idx)
            inputs.append(ours.input_layernorm(own))
            targets.append(theirs.mixer(theirs.input_layernorm(wanted), context, None))
            indices.append(context)
        masks = [batch.valid for batch in batches]
        errors.append(output_error(ours.mixer, Problem(inputs, indices, masks, [], targets)))
    return errors


@pytest.mark.parametrize("kind", MIXERS)
def test_the_fit_lowers_the_error_on_other_text(trained_pair, kind) -> None:
    teacher, student = trained_pair(kind)
    seen, unseen = (
        packed_batches(torch.Generator().manual_seed(seed), rows)
        for seed, rows in ((0, 40), (1, 8))
    )
    sharpness(teacher, unseen)
    before = mixer_errors(teacher, student, unseen)
    reports = walk(teacher, student, seen)
    after = mixer_errors(teacher, student, unseen)
    for report, old, new in zip(reports, before, after, strict=True):
        assert new < 0.9 * old
        assert report.after_refit < report.before_refit
        # the error on held-out rows predicts that on other text
        assert report.after_refit == pytest.approx(new, rel=0.15)
        assert set(report.half_lives) <= set(HALF_LIVES)


def sharpness(teacher, batches: list[Batch]) -> None:
    """Attention that is neither uniform nor on one token: otherwise a fit would prove little."""
    block, batch = teacher.model.layers[1], batches[0]
    hidden = block.input_layernorm(hidden_states(teacher, batch)[1])[0]
    q, k = (
        (hidden @ getattr(block.mixer, f"{n}_proj").weight.T).unflatten(-1, (-1, HEAD_DIM))[:, 0]
        for n in "qk"
    )
    first = int((batch.seq_idx[0] == 0).sum())
    weights = (q[first - 1] @ k[:first].T / HEAD_DIM**0.5).softmax(-1)
    effective = 1 / float(weights.square().sum())
    assert 2 < effective < 0.7 * first, effective


@pytest.mark.parametrize("kind", MIXERS)
def test_each_layer_is_fitted_on_the_stream_of_the_fitted_student(
    trained_pair, kind, monkeypatch
) -> None:
    teacher, student = trained_pair(kind)
    batches = packed_batches(torch.Generator().manual_seed(0), 8)
    problems = []

    def remembered(spec, mixer, attention, problem):
        problems.append(problem)
        return fit_mixer(spec, mixer, attention, problem)

    monkeypatch.setattr(fitting, "fit_mixer", remembered)
    walk(teacher, student, batches)
    for layer, problem in zip((1, 2), problems, strict=True):
        norm = student.model.layers[layer].input_layernorm
        for i, batch in enumerate(batches):
            own, theirs = (hidden_states(m, batch)[layer] for m in (student, teacher))
            torch.testing.assert_close(problem.inputs[i], norm(own), rtol=1e-4, atol=1e-4)
            wanted = teacher.model.layers[layer].mixer(norm(theirs), problem.contexts[i], None)
            torch.testing.assert_close(problem.targets[i], wanted, rtol=1e-4, atol=1e-4)
    # in the second layer the two streams differ
    assert not torch.allclose(problems[1].inputs[0], norm(theirs), atol=0.01)


def test_rows_of_one_document_and_their_padding(trained_pair, rows) -> None:
    """Plain causal batches, whose padding has no document number of its own."""
    teacher, student = trained_pair("mamba2")
    batches = [collate([row]) for row in rows if not row.seq_idx[row.valid].any()]
    assert batches and all(batch.seq_idx is None for batch in batches)
    assert any(not batch.valid.all() for batch in batches)
    other = [b._replace(input_ids=torch.where(b.valid, b.input_ids, 5)) for b in batches]
    assert any(
        not torch.equal(a.input_ids, b.input_ids) for a, b in zip(batches, other, strict=True)
    )
    again = trained_pair("mamba2")[1]
    assert walk(teacher, student, batches) == walk(teacher, again, other)
    for name, tensor in student.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
