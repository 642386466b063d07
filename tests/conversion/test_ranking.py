"""Scores of swapped layers against whole models, and the greedy path against brute force."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch

from mambactl.conversion import ranking
from mambactl.conversion.ranking import (
    Instruments,
    Score,
    addition_forwards,
    greedy_addition,
    merit,
    score_of,
    swap_scores,
)
from mambactl.data.format import Example
from mambactl.data.pack import collate, pack
from mambactl.evaluation.recall import kv_probe, measure_recall

LAYERS = 5


class Counter:
    """A progress task that counts."""

    def __init__(self):
        self.done = 0

    def advance(self, amount=1, status=""):
        self.done += amount


@pytest.fixture(scope="module")
def teacher(make_hybrid):
    return make_hybrid(["attention"] * LAYERS, seed=1)


@pytest.fixture(scope="module")
def mixers(make_hybrid, teacher):
    """A student whose mixers alone differ from the teacher's attention."""
    student = make_hybrid(["mamba2"] * LAYERS, seed=2)
    shared = dict(teacher.named_parameters())
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if name in shared:
                parameter.copy_(shared[name])
            elif name.endswith("out_proj.weight"):
                parameter.mul_(0.3)
    return student


@pytest.fixture(scope="module")
def batches():
    draw = np.random.default_rng(0)
    examples = [
        Example(draw.integers(3, 97, n).astype(np.int32), np.ones(n, bool))
        for n in (48, 30, 17, 40, 5)
    ]
    rows = pack(examples, 48)
    return [collate(rows[:2]), collate(rows[2:])]


@pytest.fixture(scope="module")
def probe(tiny_tokenizer):
    return kv_probe(tiny_tokenizer, 90, rows=2, seed=0)


@pytest.fixture
def instruments(teacher, batches, probe):
    return Instruments(teacher, batches, probe, batch_size=1)


def hybrid_of(teacher, mixers, replaced):
    model = copy.deepcopy(teacher)
    for index in replaced:
        model.model.layers[index] = mixers.model.layers[index]
    return model


@torch.no_grad()
def dense_kl(teacher, model, batches):
    total = count = 0
    for batch in batches:
        keywords = {"position_ids": batch.position_ids, "seq_idx": batch.seq_idx}
        p, q = (
            m(batch.input_ids, use_cache=False, **keywords).logits.double().log_softmax(-1)
            for m in (teacher, model)
        )
        counted = batch.loss_mask[:, 1:]
        total += float((p.exp() * (p - q)).sum(-1)[:, :-1][counted].sum())
        count += int(counted.sum())
    return total / count


def test_scores_equal_those_of_whole_models(teacher, mixers, batches, probe, instruments):
    blocks, other = list(teacher.model.layers), mixers.model.layers
    asked, task = [], Counter()

    def swap(index):
        asked.append(index)
        return other[index]

    found = swap_scores(blocks, swap, [3, 0, 1], instruments, task)
    assert asked == [0, 1, 3] and set(found) == {0, 1, 3} and task.done == 3
    for index, score in found.items():
        model = hybrid_of(teacher, mixers, [index])
        assert score.kl == pytest.approx(dense_kl(teacher, model, batches), rel=1e-4)
        recalled = measure_recall(model, probe)
        assert score.recall == recalled["recall"]
        assert score.recall_loss == pytest.approx(recalled["recall_loss"], rel=1e-4)
    assert len({round(score.kl, 5) for score in found.values()}) == 3


def test_chunks_do_not_change_the_scores(mixers, instruments, monkeypatch):
    whole = score_of(mixers.model.layers, instruments)
    # five rows of logits at a time
    monkeypatch.setattr(ranking, "CHUNK_ELEMENTS", 5 * 97)
    assert score_of(mixers.model.layers, instruments).kl == pytest.approx(whole.kl, rel=1e-5)


def test_the_teacher_itself_scores_zero(teacher, batches):
    score = score_of(teacher.model.layers, Instruments(teacher, batches))
    assert score == Score(0.0)


@pytest.mark.parametrize("criterion", ["kl", "recall"])
def test_the_path_is_that_of_brute_force(teacher, mixers, instruments, criterion):
    attention = dict(enumerate(teacher.model.layers))
    task = Counter()
    path, alone = greedy_addition(
        mixers.model.layers, attention, 3, criterion, instruments, task, top=LAYERS
    )
    kept, base = [], score_of(mixers.model.layers, instruments)
    assert path[0].layer is None and path[0].score == base
    for step in path[1:]:
        scores = {}
        for index in set(range(LAYERS)) - set(kept):
            stack = [
                attention[i] if i in (*kept, index) else mixers.model.layers[i]
                for i in range(LAYERS)
            ]
            scores[index] = score_of(stack, instruments)
        worth = merit({i: base.gain(score) for i, score in scores.items()}, criterion)
        assert step.layer == max(worth, key=worth.__getitem__)
        assert step.score.kl == pytest.approx(scores[step.layer].kl, rel=1e-5)
        if len(kept) == 0:
            assert {i: s.kl for i, s in alone.items()} == pytest.approx(
                {i: s.kl for i, s in scores.items()}, rel=1e-5
            )
        kept.append(step.layer)
        base = step.score
    assert task.done == addition_forwards(LAYERS, 3, top=LAYERS) == 5 + 4 + 3


def test_all_attention_restored_is_the_teacher(teacher, mixers, batches):
    """Whatever is skipped on the way; only the best two are measured again."""
    attention, task = dict(enumerate(teacher.model.layers)), Counter()
    path, _ = greedy_addition(
        mixers.model.layers, attention, LAYERS, "kl", Instruments(teacher, batches), task, top=2
    )
    assert sorted(step.layer for step in path[1:]) == list(range(LAYERS))
    assert path[0].score.kl > 0.01 and path[-1].score.kl == pytest.approx(0, abs=1e-6)
    assert task.done == addition_forwards(LAYERS, LAYERS, top=2) == 5 + 2 + 2 + 2 + 1


def test_merit_adds_standardised_drops():
    gains = {0: (1.0, 0.0), 1: (0.9, 5.0), 2: (0.0, 1.0)}
    by_kl, by_both = merit(gains, "kl"), merit(gains, "recall")
    assert max(by_kl, key=by_kl.__getitem__) == 0 and max(by_both, key=by_both.__getitem__) == 1
    column = np.array([[1.0, 0.9, 0.0], [0.0, 5.0, 1.0]])
    expected = ((column - column.mean(1, keepdims=True)) / column.std(1, keepdims=True)).sum(0)
    assert list(by_both.values()) == pytest.approx(expected.tolist())
    # equal drops decide nothing
    assert merit({4: (1.0, 2.0), 7: (1.0, 3.0)}, "recall") == {4: -1.0, 7: 1.0}


def test_a_model_that_diverges_comes_last_and_one_that_heals_first():
    worth = merit({0: (0.1, 0.0), 1: (math.nan, 0.0), 2: (math.inf, 0.0), 3: (0.2, 0.0)}, "kl")
    order = sorted(worth, key=worth.__getitem__)
    assert order == [1, 0, 3, 2]
    assert all(a < b for a, b in itertools.pairwise(worth[index] for index in order))
