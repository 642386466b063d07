"""Errors by layer against whole rows one by one, and the two ends of the scale."""

import copy

import pytest
import torch

from mambactl.errors import UsageError
from mambactl.evaluation.layers import layer_errors, require_layers


@pytest.fixture(scope="module")
def teacher(make_hybrid):
    return make_hybrid(["attention"] * 3, seed=1)


@pytest.fixture(scope="module")
def student(make_hybrid):
    return make_hybrid(["mamba2", "attention", "mamba1"], seed=2)


@pytest.fixture(scope="module")
def documents():
    draw = torch.Generator().manual_seed(0)
    return [torch.randint(97, (n,), generator=draw).tolist() for n in (40, 23, 9)]


def test_errors_are_those_of_unpadded_rows(student, teacher, documents):
    """One row at a time, with the input and output of the attention read by hooks."""
    seen = {}
    hooks = [
        teacher.model.layers[index].mixer.register_forward_hook(
            lambda _, given, output, index=index: seen.__setitem__(index, (given[0], output))
        )
        for index in (0, 2)
    ]
    totals, tokens = {0: 0.0, 2: 0.0}, 0
    with torch.no_grad():
        for document in documents:
            ids = torch.tensor([document])
            teacher(ids)
            _, context = teacher.model.enter(ids)
            for index in totals:
                entered, wanted = seen[index]
                got = student.model.layers[index].mixer(entered, context, None)
                error = (got - wanted).double().square().mean() / wanted.double().var(correction=0)
                totals[index] += float(error) * len(document)
            tokens += len(document)
    for hook in hooks:
        hook.remove()
    found = layer_errors(student, teacher, documents, batch_size=1)
    assert found == {i: pytest.approx(total / tokens, rel=1e-4) for i, total in totals.items()}
    # in one padded batch the variance is that of all three
    together = layer_errors(student, teacher, documents, batch_size=3)
    assert together == {i: pytest.approx(error, rel=0.2) for i, error in found.items()}
    assert together != found


def test_silent_mixers_have_an_error_of_about_one(student, teacher, documents):
    silent = copy.deepcopy(student)
    for index in (0, 2):
        torch.nn.init.zeros_(silent.model.layers[index].mixer.out_proj.weight)
        if silent.model.layers[index].mixer.out_proj.bias is not None:
            torch.nn.init.zeros_(silent.model.layers[index].mixer.out_proj.bias)
    for error in layer_errors(silent, teacher, documents).values():
        assert error == pytest.approx(1, abs=0.1)


def test_layers_that_do_not_correspond_are_refused(student, teacher, make_hybrid):
    with pytest.raises(UsageError, match="no Mamba layer"):
        require_layers(teacher.config, teacher.config)
    with pytest.raises(UsageError, match=r"no attention in the layers \[0, 2\]") as raised:
        require_layers(student.config, student.config)
    assert "--teacher" in raised.value.hint
