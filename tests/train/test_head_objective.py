"""Training of a draft head: its passes are those of decoding, and its loss falls."""

import pytest
import torch
from decode.heads import guided, head_for

from mambactl.data.pack import Batch
from mambactl.decode.engine import Engine
from mambactl.decode.head_drafter import HeadDrafter, HeadReading
from mambactl.decode.sampler import SamplingParams
from mambactl.models.cache import HybridCache
from mambactl.speed.limits import tokens_per_step
from mambactl.train.frequent_tokens import frequent
from mambactl.train.head_objective import HeadObjective
from mambactl.train.held_out_drafts import HeldOutDrafts, steps_of
from mambactl.train.losses import Teacher

TEXTS = [[5, 9, 11, 30, 9, 11, 8, 4, 60], [7, 3, 44, 9, 21]]
PASSES = 4


@pytest.fixture(scope="module")
def target(make_hybrid):
    return guided(make_hybrid(["mamba2", "attention"], seed=3, num_key_value_heads=2))


def packed(texts) -> Batch:
    """All texts as the documents of one row."""
    ids = torch.tensor([sum(texts, [])])
    positions = torch.tensor([[n for text in texts for n in range(len(text))]])
    numbers = torch.tensor([[n for n, text in enumerate(texts) for _ in text]], dtype=torch.int32)
    learned = positions > 0
    seq_idx = numbers if len(texts) > 1 else None
    return Batch(ids, seq_idx, positions, learned, torch.ones_like(learned))


def decoded(target, head, text, last, drafts):
    """The head's stream [D] behind text[last], the last `drafts` tokens of which it guessed."""
    reading, cache = HeadReading.start(head, 1), HybridCache(target.config, 1)
    known = torch.tensor([text[: last - drafts + 1]])
    with torch.no_grad():
        streams = target.model.read(known, cache, None)
        before = torch.cat([torch.zeros_like(streams[:, :1]), streams[:, :-1]], 1)
        own = head.read(before, known, reading.cache, None)[:, -1:]
        for token in text[last - drafts + 1 : last + 1]:
            own = head.read(own, torch.tensor([[token]]), reading.cache, None)
    return own[0, -1]


@pytest.mark.parametrize("texts", [TEXTS[:1], TEXTS])
def test_a_pass_sees_what_decoding_would_have_held(target, texts) -> None:
    head, batch = head_for(target), packed(texts)
    objective = HeadObjective(head, target, PASSES, 1.0, 0.0)
    with torch.no_grad():
        passes = list(objective.passes(batch, objective._streams(batch)))
    at = 0
    for text in texts:
        for position in range(len(text)):
            for drafts in range(min(PASSES, position + 1)):
                found = passes[drafts][0, at + position]
                wanted = decoded(target, head, text, position, drafts)
                torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
        at += len(text)


def test_only_tokens_that_can_be_drafted_count(target) -> None:
    head, batch = head_for(target, 60), packed(TEXTS)
    objective = HeadObjective(head, target, 2, 1.0, 0.5)
    learned = [token for text in TEXTS for token in text[1:] if token in head.ids]
    assert objective.count(batch) == len(learned) < len(sum(TEXTS, [])) - 2
    with torch.no_grad():
        streams = objective._streams(batch)
        guide = Teacher(target.model.norm(streams), objective.rows)
        loss = objective._losses(batch, streams, guide)
    assert loss > 0 and torch.isfinite(loss)


def test_the_loss_falls(target) -> None:
    head, batch = head_for(target, noise=1.0), packed(TEXTS)
    objective = HeadObjective(head, target, 2, 1.0, 0.1)
    trained = [p.requires_grad_(True) for n, p in head.named_parameters() if "layers" in n]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        losses.append(objective.backward(batch, objective.count(batch)).item())
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]
    assert target.model.embed_tokens.weight.grad is None


@pytest.mark.parametrize("tokens", [None, 60])
def test_expected_steps_are_those_of_decoding(target, tokens) -> None:
    """On greedy text every draft is right or wrong, so that expected steps are whole numbers."""
    head, prompts = head_for(target, tokens), [[5, 9, 11], [7, 3, 44, 9]]
    params = SamplingParams(max_new_tokens=20)
    for drafts in (1, PASSES):
        done = Engine(target, HeadDrafter(head), drafts).generate(prompts, params)
        batch = packed([[*p, *text] for p, text in zip(prompts, done.tokens, strict=True)])
        asked = torch.tensor([n < len(p) for p in prompts for n in range(len(p) + 20)])
        batch = batch._replace(loss_mask=batch.loss_mask & ~asked)
        measured = HeldOutDrafts(HeadObjective(head, target, PASSES, 1.0, 0.0), [batch], PASSES)
        shown, found = measured.measure(), measured.facts()
        assert shown["eval_tokens"] == 40
        row = found["drafts"][drafts - 1]
        assert row["tokens_per_step"] == pytest.approx(done.stats.tokens_per_step)
        assert 1 <= row["sampled_tokens_per_step"] <= drafts + 1
        covered = sum(token in head.ids.tolist() for text in done.tokens for token in text)
        assert found["covered"] == pytest.approx(covered / 40)


def test_steps_of_equal_chances_have_the_mean_of_a_geometric_distribution() -> None:
    chances = [[0.7] * 4000] * 3
    assert 4000 / steps_of(chances, 3) == pytest.approx(tokens_per_step(3, 0.7), rel=1e-3)


def test_ties_of_counts_go_to_the_next_ones_and_then_to_lower_ids() -> None:
    written, data = torch.tensor([0, 2, 0, 0, 5]), torch.tensor([1, 0, 1, 9, 0])
    assert frequent([written, data], 4).tolist() == [0, 1, 3, 4]
