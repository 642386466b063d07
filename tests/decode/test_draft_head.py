"""Draft heads: exact greedy speculation, no trace of what was rejected, and their files."""

import pytest
import torch
from decode.heads import guided, head_for

from mambactl.decode.engine import Engine
from mambactl.decode.head_drafter import HeadDrafter, HeadReading
from mambactl.decode.sampler import SamplingParams
from mambactl.models.draft_head import shifted

MIXERS = ["mamba2", "attention", "mamba2_window"]
PROMPTS = [[5, 9, 11, 30, 9, 11], [7], [3, 4, 5, 6, 7, 8, 9, 10, 40, 41, 42]]


@pytest.fixture(scope="module")
def target(make_hybrid):
    return guided(make_hybrid(MIXERS, seed=3))


@pytest.mark.parametrize("tokens", [None, 60])
@pytest.mark.parametrize("k", [1, 3, 5])
def test_every_greedy_token_is_that_of_plain_decoding(target, k, tokens) -> None:
    params = SamplingParams(max_new_tokens=60, eos_token_ids=(8,))
    plain = Engine(target).generate(PROMPTS, params)
    found = Engine(target, HeadDrafter(head_for(target, tokens)), k).generate(PROMPTS, params)
    assert found.tokens == plain.tokens
    assert found.stats.accepted > 15 and found.stats.rejections > 15


def test_rejected_drafts_leave_no_trace(target) -> None:
    """After many steps the head's keys are bit for bit those of a head that read the text alone."""
    head = head_for(target)
    engine = Engine(target, HeadDrafter(head), 4)
    texts = engine.generate(PROMPTS[:1], SamplingParams(max_new_tokens=40)).tokens
    drafter = engine.drafter
    assert isinstance(drafter, HeadDrafter)
    held = int(drafter.known[0])
    text = [*PROMPTS[0], *texts[0]][:held]
    other = HeadReading.start(head, 1)
    plain = Engine(target)
    cache = plain.prefixes.of([text])
    assert cache is None and held > 40
    # token by token, as the engine's passes of few tokens compute
    from mambactl.models.cache import HybridCache

    own = HybridCache(target.config, 1)
    for token in text:
        ids = torch.tensor([[token]])
        with torch.no_grad():
            other(ids, target.model.read(ids, own, None), None)
    for ours, theirs in zip(drafter.cache.layers, other.cache.layers, strict=True):
        for a, b in zip(ours.tensors(), theirs.tensors(), strict=True):
            torch.testing.assert_close(a[:, :, :held], b[:, :, :held], rtol=1e-4, atol=1e-4)
    assert shifted(torch.ones(1, 2, 3), torch.zeros(1, 3))[0, 0].sum() == 0
