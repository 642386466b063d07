"""Frozen weights exist once, in the type of the products, and are saved as they came."""

import pytest
import torch

from mambactl.data.pack import collate
from mambactl.train.optimization import LogitsObjective, mixer_parameters
from mambactl.train.sharing import restore, share_frozen

BF16 = torch.bfloat16


@pytest.fixture
def bf16_pair(pair):
    """Student and teacher as stored in bf16."""
    student, teacher = pair
    return student.to(BF16), teacher.to(BF16)


def storage(parameter):
    return parameter.untyped_storage().data_ptr()


def test_what_the_teacher_has_is_held_once(bf16_pair):
    student, teacher = bf16_pair
    with torch.no_grad():
        # one frozen tensor is the student's own
        student.model.layers[1].mlp.up_proj.weight.add_(1)
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    trained = mixer_parameters(student)
    found = share_frozen(student, teacher, trained, BF16)
    theirs = dict(teacher.named_parameters())
    own = "model.layers.1.mlp.up_proj.weight"
    assert set(found.shared) == (before.keys() & theirs.keys()) - {own} and not found.rounded
    for name, parameter in student.named_parameters():
        assert torch.equal(parameter.float(), before[name].float())
        assert parameter.dtype == (torch.float32 if name in trained else BF16)
        assert (name in found.shared) == (
            name in theirs and storage(parameter) == storage(theirs[name])
        )


def test_training_leaves_the_teacher_as_it_is(bf16_pair, rows):
    student, teacher = bf16_pair
    before = {name: p.detach().clone() for name, p in teacher.named_parameters()}
    trained = mixer_parameters(student)
    share_frozen(student, teacher, trained, BF16)
    student.requires_grad_(False)
    for parameter in trained.values():
        parameter.requires_grad_(True)
    objective, batch = LogitsObjective(student, teacher, amp=BF16), collate(rows[:2])
    optimizer = torch.optim.SGD(trained.values(), lr=1.0)
    objective.backward(batch, objective.count(batch))
    optimizer.step()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in trained.values())
    for name, parameter in teacher.named_parameters():
        assert torch.equal(parameter, before[name])


def test_rounded_values_come_back_before_saving(pair):
    student, teacher = pair
    stored = {name: p.detach().clone() for name, p in student.named_parameters()}
    trained = mixer_parameters(student)
    found = share_frozen(student, teacher.to(BF16), trained, BF16)
    assert set(found.rounded) == {
        name for name, t in stored.items()
        if name not in trained and not torch.equal(t.bfloat16().float(), t)
    }  # fmt: skip
    assert len(found.rounded) > 10 and "model.layers.1.self_attn.q_proj.weight" in found.shared
    restore(student, found.rounded, stored.__getitem__)
    for name, parameter in student.named_parameters():
        assert torch.equal(parameter.float(), stored[name])


def test_decays_stay_fp32_when_they_are_frozen(bf16_pair):
    student, teacher = bf16_pair
    share_frozen(student, teacher, [], BF16)
    kinds = {name.rpartition(".")[2]: p.dtype for name, p in student.named_parameters()}
    assert {kinds[name] for name in ("A_log", "D", "dt_bias")} == {torch.float32}


def test_a_tied_head_stays_tied(make_hybrid):
    student = make_hybrid(["mamba2", "attention"], tie_word_embeddings=True)
    assert not share_frozen(student, None, [], BF16).shared
    assert student.lm_head.weight is student.model.embed_tokens.weight
    assert student.lm_head.weight.dtype == BF16


def test_names_that_do_not_exist_are_refused(pair):
    with pytest.raises(ValueError, match="no parameters nothing"):
        share_frozen(*pair, ["nothing"], BF16)
