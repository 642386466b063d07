"""Verdicts on drafted tokens, on the device, against `decode.accept` for the same numbers.

Accepted counts and tokens: equal but for one row of each test, where rounding may decide.
"""

import pytest
import torch
from torch import Tensor

from mambactl.decode.accept import Proposal, accept_greedy, accept_sampled
from mambactl.decode.sampler import draw, filtered_probs, uniform
from mambactl.kernels.decode.reference import verdict as reference
from mambactl.kernels.random import Stream

pytestmark = pytest.mark.one_in(6)

pytest.importorskip("triton")
kernels = pytest.importorskip("mambactl.kernels.decode.triton.verdict")

BATCH = 1000 if torch.cuda.is_available() else 60


def filtered(logits: Tensor, settings: Tensor) -> tuple[Tensor, Tensor]:
    """Threshold and log_mass of logits [..., V], shaped [...]."""
    flat = logits.flatten(0, 1)
    threshold, log_mass = (torch.empty_like(flat[:, 0]) for _ in range(2))
    reference.filter_rows(flat, settings, threshold, log_mass)
    return threshold.view(logits.shape[:-1]), log_mass.view(logits.shape[:-1])


def assert_nearly_equal(actual: Tensor, expected: Tensor) -> None:
    assert (actual != expected).sum() <= 1


class Round:
    """One step of B sequences and K drafts: logits, drafts that follow the draft's rows, counts."""

    def __init__(self, batch: int, width: int, size: int, closeness: float, device: str, scale=1.5):
        generator = torch.Generator().manual_seed(0)
        draft = scale * torch.randn(width, batch, size, generator=generator)
        target = scale * torch.randn(batch, width + 1, size, generator=generator)
        target[:, :width] += closeness * (draft.transpose(0, 1) - target[:, :width])
        target[..., -2:] = float("-inf")
        self.draft, self.target = draft.to(device), target.to(device)
        self.keys = torch.arange(batch, device=device) + 5
        self.positions = (self.keys % 11).int()
        self.seed = torch.tensor([3], device=device)
        lengths = torch.randint(0, width + 1, (batch,), generator=generator)
        self.lengths = lengths.int().to(device)
        self.tokens = torch.zeros(batch, width + 2, dtype=torch.int32, device=device)

    def propose(self, values: tuple) -> None:
        for index, logits in enumerate(self.draft):
            numbers = uniform(3, self.keys, self.positions + index, Stream.PROPOSE)
            self.tokens[:, index + 1] = draw(filtered_probs(logits, *values), numbers)

    def drafts(self) -> Tensor:
        return self.tokens[:, 1:]

    def expected(self, values: tuple, certain: bool, lengths: Tensor | None):
        width = len(self.draft)
        positions = self.positions.long()[:, None] + torch.arange(
            width + 1, device=self.keys.device
        )
        rows = self.keys[:, None].expand_as(positions)
        counts = torch.full_like(self.lengths, width) if lengths is None else lengths
        probs = None if certain else filtered_probs(self.draft, *values).transpose(0, 1)
        return accept_sampled(
            filtered_probs(self.target, *values),
            Proposal(self.drafts()[:, :width].long(), counts.long(), probs),
            uniform(3, rows, positions, Stream.ACCEPT)[:, :width],
            uniform(3, rows, positions, Stream.EMIT),
        )

    def verdict(self, module, values: tuple, certain: bool, lengths: Tensor | None):
        """accepted [B], following [B]; rows behind a sequence's own drafts are poisoned."""
        settings = torch.tensor(values, dtype=torch.float32, device=self.keys.device)
        target, draft = self.target.clone(), self.draft.clone()
        if lengths is not None:
            for row, count in enumerate(lengths.tolist()):
                target[row, count + 1 :], draft[count:, row] = float("nan"), float("nan")
        of_draft, of_target = ((logits, *filtered(logits, settings)) for logits in (draft, target))
        accepted, following = (torch.full_like(self.positions, -7) for _ in range(2))
        logits, threshold, log_mass = (values.flatten(0, 1) for values in of_target)
        module.verdict_sampled(
            logits, settings, threshold, log_mass, *((None,) * 3 if certain else of_draft),
            self.drafts(), lengths, self.keys, self.positions, self.seed, accepted, following,
        )  # fmt: skip
        return accepted.long(), following.long()


@pytest.mark.parametrize("certain", [False, True])
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("values", [(1.0, 0, 1.0), (0.8, 20, 0.9)])
def test_verdicts_equal_those_of_the_decode_module(device, certain, ragged, values) -> None:
    step = Round(BATCH, width=3, size=97, closeness=0.7, device=device, scale=4 if certain else 1.5)
    if certain:
        step.tokens[:, 1:4] = step.target[:, :3].argmax(-1)
    else:
        step.propose(values)
    lengths = step.lengths if ragged else None
    expected = step.expected(values, certain, lengths)
    assert len(set(expected.accepted.tolist())) >= 3
    for module in (kernels, reference):
        accepted, following = step.verdict(module, values, certain, lengths)
        assert_nearly_equal(accepted, expected.accepted)
        assert_nearly_equal(following, expected.following)


@pytest.mark.parametrize("certain", [False, True])
def test_verdicts_over_several_blocks(device, certain) -> None:
    values = (1.0, 0, 1.0)
    step = Round(batch=25, width=2, size=5003, closeness=0.9, device=device)
    step.propose(values)
    expected = step.expected(values, certain, None)
    accepted, following = step.verdict(kernels, values, certain, None)
    assert_nearly_equal(accepted, expected.accepted)
    assert_nearly_equal(following, expected.following)


@pytest.mark.parametrize("module", [kernels, reference])
def test_the_same_draft_and_target_accept_everything(device, module) -> None:
    values = (0.9, 0, 1.0)
    step = Round(batch=20, width=2, size=97, closeness=0.0, device=device)
    step.target[:, :2] = step.draft.transpose(0, 1)
    step.propose(values)
    assert (step.verdict(module, values, False, None)[0] == 2).all()
    # what the draft never draws is refused with p = q = 0, and nothing is left but p itself
    values = (0.9, 1, 1.0)
    step.tokens[:, 1] = step.draft[0].argmin(-1)
    accepted, following = step.verdict(module, values, False, None)
    assert (accepted == 0).all()
    assert torch.equal(following, step.target[:, 0].argmax(-1))


@pytest.mark.parametrize("module", [kernels, reference])
def test_without_drafts_a_verdict_is_a_draw(device, module) -> None:
    step = Round(batch=20, width=0, size=97, closeness=0.0, device=device)
    accepted, following = step.verdict(module, (1.0, 0, 1.0), True, None)
    assert (accepted == 0).all()
    numbers = uniform(3, step.keys, step.positions.long(), Stream.EMIT)
    assert torch.equal(following, draw(step.target[:, 0].softmax(-1), numbers))


@pytest.mark.parametrize("module", [kernels, reference])
@pytest.mark.parametrize("ragged", [False, True])
def test_greedy_verdicts_equal_those_of_the_decode_module(device, module, ragged) -> None:
    generator = torch.Generator().manual_seed(1)
    best = torch.randint(2, (60, 5), generator=generator).to(device)
    drafts = torch.randint(2, (60, 6), generator=generator).int().to(device)
    counts = torch.randint(0, 5, (60,), generator=generator).to(device)
    lengths = counts.int() if ragged else None
    accepted, following = (torch.full_like(drafts[:, 0], -7) for _ in range(2))
    module.verdict_greedy(best.int().flatten(), drafts, lengths, accepted, following)
    proposal = Proposal(drafts[:, :4].long(), counts if ragged else torch.full_like(counts, 4))
    expected = accept_greedy(torch.nn.functional.one_hot(best, 2).float(), proposal)
    assert torch.equal(accepted.long(), expected.accepted)
    assert torch.equal(following.long(), expected.following)
