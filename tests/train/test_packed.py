"""A packed row is its documents apart: same hidden states, same losses, whatever the mixers."""

from functools import partial

import numpy as np
import pytest
import torch

from mambactl.data.format import Example
from mambactl.data.pack import collate, pack
from mambactl.models.transformers_names import recompute_activations
from mambactl.train.optimization import LogitsObjective, last_hidden

LAYOUTS = [["mamba2", "attention"], ["mamba1", "attention"], ["mamba2", "mamba1", "attention"]]


def _documents():
    draw = np.random.default_rng(4)
    return [
        Example(draw.integers(3, 97, n).astype(np.int32), np.ones(n, bool)) for n in (33, 20, 9, 21)
    ]


@pytest.mark.parametrize("mixers", LAYOUTS, ids="-".join)
def test_hidden_states_are_those_of_each_document_alone(make_hybrid, mixers):
    model = make_hybrid(mixers)
    documents = _documents()
    (row,) = pack(documents, 96)
    batch = collate([row])
    with torch.no_grad():
        together = last_hidden(model, batch)[0]
        for document in documents:
            ids = torch.from_numpy(document.input_ids).long()
            alone = model.model(ids[None], use_cache=False).last_hidden_state[0]
            start = _find(batch.input_ids[0], ids)
            torch.testing.assert_close(
                together[start : start + len(ids)], alone, rtol=1e-4, atol=1e-4
            )


@pytest.mark.parametrize("mixers", LAYOUTS, ids="-".join)
def test_loss_and_gradients_are_those_of_each_document_alone(make_hybrid, mixers):
    student, teacher = make_hybrid(mixers, seed=1), make_hybrid(["attention"] * 2, seed=2)
    objective = LogitsObjective(student, teacher, kl_weight=0.7, ce_weight=0.3)
    losses, gradients = [], []
    for packing in (True, False):
        rows = pack(_documents(), 96, packing=packing)
        batch = collate(rows)
        assert (batch.seq_idx is not None) == packing
        student.zero_grad()
        losses.append(objective.backward(batch, objective.count(batch)))
        gradients.append({k: p.grad.clone() for k, p in student.named_parameters()})
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-5)
    for name, packed in gradients[0].items():
        apart = gradients[1][name]
        torch.testing.assert_close(packed, apart, rtol=1e-3, atol=1e-4 * float(apart.abs().max()))


def _count(passes, *_):
    passes.append(1)


def _find(row, ids):
    windows = row.unfold(0, len(ids), 1)
    return int((windows == ids).all(1).nonzero()[0])


def test_recomputed_activations_give_the_same_gradients(make_hybrid):
    batch = collate(pack(_documents(), 96))
    teacher, gradients = make_hybrid(["attention"] * 3, seed=2), []
    for checkpointing in (False, True):
        student = make_hybrid(LAYOUTS[2], seed=1).train()
        if checkpointing:
            recompute_activations(student)
        passes: list[int] = []
        student.model.layers[0].mixer.register_forward_hook(partial(_count, passes))
        objective = LogitsObjective(student, teacher)
        objective.backward(batch, objective.count(batch))
        assert len(passes) == 1 + checkpointing
        gradients.append({name: p.grad for name, p in student.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)
