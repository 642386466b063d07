"""Log-probabilities of answers do not depend on how documents share rows, nor does what follows."""

import numpy as np
import pytest
import torch

from mambactl.data.preferences import Pair
from mambactl.evaluation.rewards import (
    Layout,
    compare_preferences,
    documents,
    read_reference,
    token_logps,
)


@pytest.fixture(scope="module")
def models(make_hybrid):
    mixers = ["mamba2", "attention", "mamba1", "attention"]
    return make_hybrid(mixers, seed=1), make_hybrid(["attention"] * 4, seed=2)


@pytest.fixture(scope="module")
def pairs():
    draw = np.random.default_rng(0)

    def ids(low, high):
        return draw.integers(3, 97, draw.integers(low, high)).astype(np.int32)

    return [Pair(f"row {n}", n, ids(3, 20), ids(1, 12), ids(1, 30)) for n in range(9)]


def oracle(model, pairs):
    """One document at a time, dense, in fp64."""
    found = []
    for pair in pairs:
        for answer in (pair.chosen, pair.rejected):
            ids = torch.from_numpy(np.concatenate([pair.prompt, answer])).long()[None]
            with torch.no_grad():
                logs = model(ids, use_cache=False).logits[0].double().log_softmax(-1)
            at = torch.arange(len(pair.prompt) - 1, ids.shape[1] - 1)
            found.append((logs[at], logs[at, ids[0, at + 1]]))
    return found


LAYOUTS = {
    "packed": Layout(64, 3, True),
    "padded": Layout(64, 5, False),
    "one row at a time": Layout(64, 1, False),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_gives_the_same_logps(models, pairs, name):
    expected = [logps for _, logps in oracle(models[0], pairs)]
    found = token_logps(models[0], documents(pairs), LAYOUTS[name])
    assert [len(part) for part in found] == [len(part) for part in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert np.abs(ours - theirs.numpy()).max() < 1e-4
    for side in (0, 1):
        means = [np.mean([part.sum() for part in parts[side::2]]) for parts in (found, expected)]
        assert abs(means[0] - means[1]) < 1e-4


def test_the_order_inside_a_packed_row_matters_not(models, pairs):
    # documents of other lengths fill rows in another order than they come in
    found = token_logps(models[0], documents(pairs[::-1]), LAYOUTS["packed"])
    alone = token_logps(models[0], documents(pairs), LAYOUTS["one row at a time"])
    for number in range(len(pairs)):
        ours, theirs = found[2 * number], alone[2 * (len(pairs) - 1 - number)]
        assert np.abs(ours - theirs).max() < 1e-4


@pytest.mark.parametrize("name", LAYOUTS)
def test_numbers_of_a_comparison(models, pairs, name):
    layout = LAYOUTS[name]
    policy, other = models
    reference = read_reference(other, documents(pairs), layout)
    found = compare_preferences(policy, reference, pairs, layout, beta=0.5)
    ours, theirs = oracle(policy, pairs), oracle(other, pairs)
    ratio = np.array([float(a[1].sum() - b[1].sum()) for a, b in zip(ours, theirs, strict=True)])
    margin = ratio[0::2] - ratio[1::2]
    kl = torch.cat(
        [(a[0].exp() * (a[0] - b[0])).sum(-1) for a, b in zip(ours, theirs, strict=True)]
    )
    assert found["pairs"] == len(pairs)
    assert found["answer_tokens"] == len(kl)
    assert found["reward_accuracy"] == pytest.approx((margin > 0).mean())
    assert found["reward_margin"] == pytest.approx(0.5 * margin.mean(), abs=1e-3)
    assert found["kl_to_reference"] == pytest.approx(float(kl.mean()), rel=1e-4)


def test_a_model_is_no_distance_from_itself(models, pairs):
    layout = LAYOUTS["packed"]
    found = compare_preferences(
        models[0], read_reference(models[0], documents(pairs), layout), pairs, layout
    )
    assert found["kl_to_reference"] == found["reward_margin"] == found["reward_accuracy"] == 0
