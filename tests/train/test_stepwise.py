"""Layers become recurrent in groups, and until then run the teacher's own attention."""

import pytest
import torch

from mambactl.data.pack import batches
from mambactl.errors import UsageError
from mambactl.train.optimization import last_hidden
from mambactl.train.stepwise import Group, StandIns, groups, replacement_order, stand_in_misfit


def test_groups_follow_shares_of_all_layers() -> None:
    order = [4, 0, 2, 6]
    assert groups(order, 8, [0.25, 0.5]) == [
        Group((0, 4), (4, 0), (2, 6)),
        Group((0, 2, 4, 6), (2, 6), ()),
    ]
    # the paper's ladder, as far as the student goes
    assert [group.recurrent for group in groups(order, 8)] == [(0, 4), (0, 2, 4, 6)]
    whole = [len(group.recurrent) for group in groups(list(range(32)), 32)]
    assert whole == [8, 16, 24, 28, 32]
    # the last group takes what is left
    assert [group.new for group in groups(order, 8, [0.25])] == [(4, 0), (2, 6)]
    assert [group.new for group in groups(order, 8, [1.0])] == [(4, 0, 2, 6)]
    for wrong in ([0.5, 0.25], [0.5, 0.5]):
        with pytest.raises(UsageError, match="do not ascend"):
            groups(order, 8, wrong)


def test_the_order_is_asked_ranked_or_ascending(make_hybrid) -> None:
    config = make_hybrid(["mamba2", "attention", "mamba1", "mamba2"]).config
    assert replacement_order(config, None, None) == [0, 2, 3]
    assert replacement_order(config, None, [3, 1, 0]) == [3, 0, 2]
    assert replacement_order(config, [2, 3, 0], [3, 1, 0]) == [2, 3, 0]
    for wrong in ([0, 2], [0, 1, 2, 3], [0, 2, 2]):
        with pytest.raises(UsageError, match="each replaced layer once: 0,2,3"):
            replacement_order(config, wrong, None)


def test_stand_ins_are_the_teachers_modules_and_go_again(pair, rows) -> None:
    student, teacher = pair
    batch = next(batches(rows, 4, seed=0))
    before = last_hidden(student, batch)
    names = [name for name, _ in student.named_parameters()]
    with StandIns(student, teacher, [0, 2]):
        assert student.model.layers[0].mixer is teacher.model.layers[0].self_attn
        assert student.config.mixers == ["attention"] * 4
        # with all else equal the student is the teacher, packed documents and all
        assert batch.seq_idx is not None
        torch.testing.assert_close(last_hidden(student, batch), last_hidden(teacher, batch))
    assert [name for name, _ in student.named_parameters()] == names
    assert student.config.mixers == ["mamba2", "attention", "mamba1", "attention"]
    assert torch.equal(last_hidden(student, batch), before)


def test_waiting_layers_get_no_gradient_and_others_do(pair, rows) -> None:
    student, teacher = pair
    with StandIns(student, teacher, [2]):
        last_hidden(student, next(batches(rows, 2, seed=0))).square().sum().backward()
    assert student.model.layers[0].mamba.in_proj.weight.grad is not None
    assert all(p.grad is None for p in student.model.layers[2].mamba.parameters())
    assert all(p.grad is None for p in teacher.parameters())


def test_stand_ins_leave_after_an_error(pair) -> None:
    student, teacher = pair
    with pytest.raises(RuntimeError), StandIns(student, teacher, [0]):
        raise RuntimeError
    assert student.model.layers[0].mixer_name == "mamba"
    assert not hasattr(student.model.layers[0], "self_attn")


def test_a_teacher_of_another_form_cannot_stand_in(make_hybrid) -> None:
    student = make_hybrid(["mamba2", "attention"]).config
    assert stand_in_misfit(student, make_hybrid(["attention"] * 2).config) is None
    other = make_hybrid(["attention"] * 2, head_dim=8).config
    assert "head_dim is 8, the student's 16" in stand_in_misfit(student, other)
    wider = make_hybrid(["attention"] * 2, hidden_size=64).config
    assert "64 hidden units" in stand_in_misfit(student, wider)
