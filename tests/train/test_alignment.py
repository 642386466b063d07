"""Alignment teaches mixers, and only mixers, what the replaced attention says."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mambactl.data.pack import collate
from mambactl.kernels.divergence import relative_error
from mambactl.models.key_ring import WindowSettings
from mambactl.train.optimization import AlignmentObjective, mixer_parameters


def test_gradients_equal_those_of_the_loss_written_out(pair, rows):
    student, teacher = pair
    batch = collate(rows[:3])
    objective = AlignmentObjective(student, teacher)
    student.zero_grad()
    loss = objective.backward(batch, objective.count(batch))
    got = {name: p.grad.clone() for name, p in mixer_parameters(student).items()}
    untouched = [name for name, p in student.named_parameters() if p.grad is not None]
    assert untouched == list(got)

    student.zero_grad()
    expected = _written_out(student, teacher, batch)
    expected.backward()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=1e-6)
    for name, parameter in mixer_parameters(student).items():
        torch.testing.assert_close(got[name], parameter.grad, rtol=1e-4, atol=1e-6)


def _written_out(student, teacher, batch):
    """Walk the teacher block by block, without hooks."""
    embedded = teacher.model.embed_tokens(batch.input_ids)
    context = teacher.model.context(embedded, batch.position_ids, None, batch.seq_idx)
    hidden, losses = embedded, []
    for ours, theirs in zip(student.model.layers, teacher.model.layers, strict=True):
        normed = theirs.input_layernorm(hidden)
        wanted = theirs.self_attn(normed, context, None)
        if ours.mixer_name == "mamba":
            got = ours.mixer(normed, context, None)[batch.valid]
            target = wanted[batch.valid]
            losses.append((got - target).square().mean() / target.var(correction=0))
        hidden = theirs(hidden, context, None)
    return sum(losses) / len(losses)


def test_only_what_kept_heads_and_windows_do_not_give_is_learned(make_hybrid, rows):
    """A layer of which little is missing weighs as much as one of which all is."""
    teacher = make_hybrid(["attention"] * 3, seed=1).requires_grad_(False)
    mixers = ["mamba2_mixed", "mamba2_window", "mamba2"]
    student = make_hybrid(mixers, seed=2, mamba2_window=WindowSettings(window=4, sinks=1))
    shared = {k: v for k, v in teacher.state_dict().items() if k in student.state_dict()}
    student.load_state_dict(shared, strict=False)
    batch = collate(rows[:3])
    hidden, context = teacher.model.enter(batch.input_ids, batch.position_ids, batch.seq_idx)
    context, losses = student.model.with_windows(context), []
    for ours, theirs in zip(student.model.layers, teacher.model.layers, strict=True):
        hidden, normed, wanted = theirs.observe(hidden, context)
        mixer, beside = ours.mixer, 0
        if ours is not student.model.layers[2]:
            beside = mixer.window(normed, context, None)
        if ours is student.model.layers[0]:
            beside = beside + mixer.attention(normed, context, None)
        missing = (wanted - beside).detach()[batch.valid]
        # the whole output against the whole target: what is given cancels
        error = (mixer(normed, context, None) - wanted)[batch.valid]
        losses.append(error.square().mean() / missing.var(correction=0))
    mixers = mixer_parameters(student)
    (sum(losses) / 3).backward()
    expected = {name: p.grad.clone() for name, p in mixers.items()}
    student.zero_grad()
    objective = AlignmentObjective(student, teacher)
    loss = objective.backward(batch, objective.count(batch))
    torch.testing.assert_close(loss, (sum(losses) / 3).detach(), rtol=1e-4, atol=1e-6)
    for name, parameter in student.named_parameters():
        assert (parameter.grad is not None) == (name in mixers), name
    for name, parameter in mixers.items():
        torch.testing.assert_close(expected[name], parameter.grad, rtol=1e-3, atol=1e-5)


def test_a_recurrence_that_adds_nothing_scores_one():
    """Down to what rounding leaves: a layer of which nothing is missing has no loss."""
    draw = torch.Generator().manual_seed(0)
    wanted = torch.randn(2, 9, 7, generator=draw)
    missing = 0.05 * torch.randn(2, 9, 7, generator=draw)
    missing -= missing.mean()
    valid = torch.ones(2, 9, dtype=torch.bool)
    silent, given = torch.zeros_like(wanted), wanted - missing
    share = relative_error(silent, wanted, valid, given) / valid.sum()
    torch.testing.assert_close(share, torch.tensor(1.0), rtol=1e-4, atol=1e-4)
    assert relative_error(silent, wanted, valid, wanted) == 0


def test_a_constant_guess_at_the_mean_scores_one():
    wanted = torch.randn(2, 9, 7, generator=torch.Generator().manual_seed(0))
    valid = torch.ones(2, 9, dtype=torch.bool)
    valid[1, 4:] = False
    guess = wanted[valid].mean().expand_as(wanted)
    share = relative_error(guess, wanted, valid) / valid.sum()
    torch.testing.assert_close(share, torch.tensor(1.0))


def test_padding_does_not_count(pair, rows):
    student, teacher = pair
    objective = AlignmentObjective(student, teacher)
    batch = collate([min(rows, key=lambda row: row.valid.sum())])
    assert 0 < objective.count(batch) < batch.valid.numel()
    other = batch._replace(input_ids=torch.where(batch.valid, batch.input_ids, 5))
    tokens = objective.count(batch)
    assert objective.backward(batch, tokens) == objective.backward(other, tokens)


class _Waits(TorchDispatchMode):
    """Refuses operations that hand values to the host: on a GPU they would empty its queue."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        masks = name in ("index", "index_put_") and any(
            t is not None and t.dtype == torch.bool for t in args[1]
        )
        if masks or name in ("_local_scalar_dense", "nonzero", "masked_select", "equal"):
            raise AssertionError(f"{name} waits for the device")
        return func(*args, **(kwargs or {}))


def test_nothing_waits_for_the_device(pair, rows):
    objective, batch = AlignmentObjective(*pair), collate(rows[:2])
    assert batch.seq_idx is not None
    alone = batch._replace(seq_idx=None)
    with _Waits():
        with pytest.raises(AssertionError, match="index waits"):
            batch.input_ids[batch.valid]
        for packed in (batch, alone):
            objective.backward(packed, 7)


def test_padding_behind_one_document_is_not_aligned(pair, rows):
    """Without numbers of documents, positions that start again in the padding say nothing."""
    objective = AlignmentObjective(*pair)
    batch = collate([min(rows, key=lambda row: row.valid.sum())])
    numbers = torch.where(batch.valid, 0, 1).int()
    tokens = objective.count(batch)
    one = batch._replace(seq_idx=None, position_ids=torch.arange(batch.valid.shape[1])[None])
    packed = one._replace(seq_idx=numbers)
    torch.testing.assert_close(objective.backward(one, tokens), objective.backward(packed, tokens))


def test_teachers_that_do_not_fit_are_refused(pair, make_hybrid):
    student, teacher = pair
    ours = student.config
    assert ours.misfit(teacher.config) is None
    assert "3 layers" in ours.misfit(make_hybrid(["attention"] * 3).config)
    assert "hidden units" in ours.misfit(make_hybrid(["attention"] * 4, hidden_size=32).config)
    with pytest.raises(ValueError, match=r"no attention in the layers \[0, 2\]"):
        AlignmentObjective(student, student)
