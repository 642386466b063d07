"""Log-likelihoods of requests that are read together, against each of them read alone."""

import random

import numpy as np
import pytest
import torch

from mambactl.evaluation.likelihood import Request, log_likelihoods
from mambactl.evaluation.prefixes import group_by_prefix

MIXERS = {
    "mamba2": ["mamba2", "attention", "mamba2", "attention"],
    "mamba1": ["mamba1", "attention", "mamba1", "attention"],
    "pure": ["mamba2", "mamba1"],
    "window": ["attention", "mamba2"],
}


def make_requests(count: int = 24, seed: int = 0) -> list[Request]:
    """Questions with choices behind worked examples, and rows of their own; many lengths."""
    rng = random.Random(seed)

    def ids(low, high):
        return [rng.randrange(3, 97) for _ in range(rng.randint(low, high))]

    shots, requests = ids(30, 30), []
    for index in range(count):
        context = [*(shots if index % 3 == 0 else []), *ids(1, 40)]
        first = ids(1, 1)
        for choice in range(rng.randint(1, 4)):
            # one token, several, and one that is another's beginning
            continuation = (
                first if choice == 0 else [*first, *ids(1, 9)] if choice < 3 else ids(1, 1)
            )
            requests.append(Request(context, continuation))
    requests.append(requests[0])
    rng.shuffle(requests)
    return requests


def alone(model, request: Request, max_length: int) -> tuple[float, bool]:
    """By the definition: all logits of one row, from a forward pass without a cache."""
    whole = [*request.context, *request.continuation][-(max_length + 1) :]
    count = len(request.continuation)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([whole[:-1]]), use_cache=False).logits[0, -count:]
    target = torch.tensor(whole[-count:])
    chances = logits.log_softmax(-1).gather(1, target[:, None])
    return float(chances.sum()), bool((logits.argmax(-1) == target).all())


@pytest.mark.parametrize("kind", MIXERS)
def test_a_batch_equals_single_rows(make_hybrid, kind):
    model = make_hybrid(MIXERS[kind], seed=3, sliding_window=24 if kind == "window" else None)
    requests = make_requests()
    expected = [alone(model, request, 64) for request in requests]
    values = torch.tensor([value for value, _ in expected])
    for size in (1, 16, "auto"):
        found = log_likelihoods(model, requests, 64, size)
        torch.testing.assert_close(
            torch.tensor([value for value, _ in found]), values, atol=1e-4, rtol=0
        )
        assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


def test_greedy_continuations_are_known(make_hybrid):
    model = make_hybrid(MIXERS["mamba2"], seed=1)
    row = [5, 9, 33]
    for _ in range(4):
        with torch.no_grad():
            row.append(int(model(input_ids=torch.tensor([row])).logits[0, -1].argmax()))
    wrong = [*row[3:6], (row[6] + 1) % 97]
    found = log_likelihoods(
        model, [Request(row[:3], row[3:]), Request(row[:3], wrong), Request([7], [8])], 64
    )
    assert [greedy for _, greedy in found[:2]] == [True, False]


def test_contexts_that_are_too_long_lose_their_beginning(make_hybrid):
    model = make_hybrid(MIXERS["mamba2"], seed=1)
    requests = [Request(list(range(3, 53)), [60 + n, 70]) for n in range(3)]
    expected = [alone(model, request, 20)[0] for request in requests]
    found = [value for value, _ in log_likelihoods(model, requests, 20)]
    assert found == pytest.approx(expected, abs=1e-4)
    assert expected != pytest.approx([alone(model, r, 64)[0] for r in requests], abs=1e-3)


def test_what_is_read(make_hybrid, monkeypatch):
    """Four choices of one token cost one row; worked examples are read once for all questions."""
    model = make_hybrid(MIXERS["mamba2"], seed=1)
    shots = list(range(3, 43))
    requests = [
        Request([*shots, 50 + question, 60], [70 + choice])
        for question in range(6)
        for choice in range(4)
    ]
    read = []
    forward = model.model.forward
    monkeypatch.setattr(
        model.model,
        "forward",
        lambda input_ids, **rest: read.append(input_ids.numel()) or forward(input_ids, **rest),
    )
    heard = []
    log_likelihoods(model, requests, 64, "auto", heard.append)
    assert sum(read) == len(shots) + 6 * 2
    assert sum(heard) == len(requests)


def test_halves_what_does_not_fit(make_hybrid, monkeypatch):
    model = make_hybrid(MIXERS["mamba2"], seed=1)
    requests = make_requests(12)
    expected = [value for value, _ in log_likelihoods(model, requests, 64)]
    forward = model.model.forward

    def small(input_ids, **rest):
        if input_ids.shape[0] > 3:
            raise torch.OutOfMemoryError("no")
        return forward(input_ids, **rest)

    monkeypatch.setattr(model.model, "forward", small)
    heard = []
    found = [value for value, _ in log_likelihoods(model, requests, 64, "auto", heard.append)]
    assert found == pytest.approx(expected, abs=1e-4)
    assert sum(heard) == len(requests)


def test_groups_hold_every_row_once_and_share_what_they_say():
    requests = make_requests(60, seed=5)
    rows = list({(*r.context, *r.continuation): None for r in requests})
    arrays = [np.array(row) for row in rows]
    groups = group_by_prefix(arrays)
    assert sorted(row for group in groups for row in group.rows) == list(range(len(rows)))
    for group in groups:
        assert len({rows[row][: group.shared] for row in group.rows}) == 1
    tokens = sum(
        group.shared + sum(len(rows[row]) - group.shared for row in group.rows) for group in groups
    )
    assert tokens < 0.7 * sum(map(len, rows))


def test_no_groups_where_little_is_shared():
    rng = np.random.default_rng(0)
    rows = [np.array([1, 2, *rng.integers(3, 97, 20)]) for _ in range(30)]
    assert all(len(group.rows) == 1 for group in group_by_prefix(rows))


@pytest.mark.parametrize("mixers", [["mamba2", "attention"], ["mamba1", "mamba2_window"]])
def test_in_fp64_a_model_that_magnifies_rounding_scores_alike_in_any_batch(make_hybrid, mixers):
    """In fp32 these rows move by 1e-4, and those of an untrained student by 1e-3."""
    model = make_hybrid(mixers * 3, seed=3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                parameter.mul_(6)
    rng = random.Random(1)
    requests = [
        Request(*([rng.randrange(3, 97) for _ in range(rng.randint(*size))] for size in sizes))
        for sizes in [((30, 120), (1, 30))] * 24
    ]

    def scores(size: int) -> list[float]:
        return [value for value, _ in log_likelihoods(model, requests, 256, size)]

    assert scores(16) != pytest.approx(scores(1), abs=2e-6, rel=0)
    model.double()
    assert scores(16) == pytest.approx(scores(1), abs=2e-6, rel=0)
