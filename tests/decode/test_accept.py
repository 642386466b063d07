"""Acceptance without models: hand-made cases and the distribution of what comes out."""

import pytest
import torch

from mambactl.decode import accept
from mambactl.decode.accept import Proposal, accept_greedy, accept_sampled, residual
from mambactl.decode.sampler import draw

V = 6


def one_hot_logits(tokens: list[list[int]]) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.tensor(tokens), V).float()


def test_greedy_keeps_the_matching_prefix_per_row():
    logits = one_hot_logits([[1, 2, 3, 4]] * 5)
    drafts = torch.tensor([[1, 2, 3], [1, 2, 5], [0, 2, 3], [1, 5, 3], [1, 2, 3]])
    verdict = accept_greedy(logits, Proposal(drafts, torch.tensor([3, 3, 3, 3, 2])))
    assert verdict.accepted.tolist() == [3, 2, 0, 1, 2]
    assert verdict.following.tolist() == [4, 3, 1, 2, 3]


def test_nothing_drafted_gives_the_targets_own_token():
    nothing = Proposal(torch.zeros(2, 0, dtype=torch.long), torch.zeros(2, dtype=torch.long))
    assert accept_greedy(one_hot_logits([[3], [5]]), nothing).following.tolist() == [3, 5]
    verdict = accept_sampled(
        one_hot_logits([[3], [5]]), nothing, torch.zeros(2, 0), torch.full((2, 1), 0.5)
    )
    assert verdict.accepted.tolist() == [0, 0]
    assert verdict.following.tolist() == [3, 5]


def test_garbage_behind_a_rows_own_drafts_is_ignored():
    logits = one_hot_logits([[1, 2, 3], [1, 2, 3]])
    drafts = torch.tensor([[1, 2], [1, 2]])
    verdict = accept_greedy(logits, Proposal(drafts, torch.tensor([0, 1])))
    assert verdict.accepted.tolist() == [0, 1]
    assert verdict.following.tolist() == [1, 2]


def test_residual_after_a_rejection_and_after_full_acceptance():
    p = torch.tensor([[[0.5, 0.3, 0.2], [0.1, 0.2, 0.7]]])
    q = torch.tensor([[[0.2, 0.7, 0.1]]])
    proposal = Proposal(torch.tensor([[1]]), torch.tensor([1]), q)
    rejected = residual(p, proposal, torch.tensor([0]))
    torch.testing.assert_close(rejected, torch.tensor([[0.3, 0.0, 0.1]]))
    torch.testing.assert_close(residual(p, proposal, torch.tensor([1])), p[:, 1])
    certain = Proposal(proposal.tokens, proposal.lengths)
    without = residual(p, certain, torch.tensor([0]))
    torch.testing.assert_close(without, torch.tensor([[0.5, 0.0, 0.2]]))


def test_an_underflowing_residual_falls_back_to_the_target():
    p = torch.tensor([[[0.25, 0.75], [0.5, 0.5]]])
    proposal = Proposal(torch.tensor([[0]]), torch.tensor([1]), p[:, :1].clone())
    assert residual(p, proposal, torch.tensor([0])).tolist() == [[0.25, 0.75]]


def test_a_token_impossible_for_the_target_never_passes():
    p = torch.tensor([[[0.0, 1.0], [0.5, 0.5]]])
    for q in (None, torch.tensor([[[1.0, 0.0]]])):
        proposal = Proposal(torch.tensor([[0]]), torch.tensor([1]), q)
        verdict = accept_sampled(p, proposal, torch.zeros(1, 1), torch.zeros(1, 2))
        assert verdict.accepted.item() == 0
        assert verdict.following.item() == 1


def first_two_tokens(certain_draft: bool, n: int = 40000) -> tuple[torch.Tensor, torch.Tensor]:
    """Counts [V, V] of the first two tokens of one step of n rows, and the target's tables.

    Target and draft are random tables p(x1), p(x2 | x1), p(x3); rows that emit one token only are
    completed from the target, as the next step would.
    """
    generator = torch.Generator().manual_seed(0)
    tables = [torch.randn(V + 1, V, generator=generator).mul(1.5).softmax(-1) for _ in range(2)]
    target, draft = tables
    numbers = torch.rand(8, n, generator=generator, dtype=torch.double)
    if certain_draft:
        drafts = torch.tensor([[2, 4]]).expand(n, 2)
        probs = None
    else:
        first = draw(draft[V].expand(n, V), numbers[0])
        drafts = torch.stack([first, draw(draft[first], numbers[1])], 1)
        probs = torch.stack([draft[V].expand(n, V), draft[first]], 1)
    truth = torch.stack([target[V].expand(n, V), target[drafts[:, 0]], target[drafts[:, 1]]], 1)
    proposal = Proposal(drafts, torch.full((n,), 2), probs)
    verdict = accept_sampled(truth, proposal, numbers[2:4].T, numbers[4:7].T)
    kept = verdict.accepted > 0
    first = torch.where(kept, drafts[:, 0], verdict.following)
    second = torch.where(verdict.accepted > 1, drafts[:, 1], verdict.following)
    second = torch.where(kept, second, draw(target[first], numbers[7]))
    counts = torch.bincount(first * V + second, minlength=V * V)
    return counts, target[V][:, None] * target[:V]


@pytest.mark.parametrize("certain_draft", [False, True])
def test_emitted_tokens_follow_the_target(certain_draft, p_value):
    assert p_value(*first_two_tokens(certain_draft)) > 1e-3


@pytest.mark.parametrize("certain_draft", [False, True])
@pytest.mark.parametrize("broken", ["always accept", "no residual"])
def test_the_distribution_test_catches_a_broken_rule(broken, certain_draft, p_value, monkeypatch):
    if broken == "always accept":
        monkeypatch.setattr(accept, "_leading", lambda matches, lengths: lengths)
    else:
        monkeypatch.setattr(accept, "residual", lambda p, proposal, n: accept._pick(p, n))
    assert p_value(*first_two_tokens(certain_draft)) < 1e-6
