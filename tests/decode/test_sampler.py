"""Filtering, the counter-based uniforms and drawing from a distribution."""

import pytest
import torch

from mambactl.decode.sampler import Sampler, SamplingParams, Stream, draw, filtered_probs, uniform
from mambactl.errors import UsageError
from mambactl.options.fields import COOLEST


def test_filters_apply_along_the_vocabulary_for_any_leading_shape():
    logits = torch.randn(3, 5, 11, generator=torch.Generator().manual_seed(0))
    options = {"temperature": 0.7, "top_k": 7, "top_p": 0.6}
    together = filtered_probs(logits, **options)
    for row in range(3):
        for place in range(5):
            single = filtered_probs(logits[row, place], **options)
            torch.testing.assert_close(together[row, place], single)


def test_filters_equal_a_hand_made_example():
    logits = torch.tensor([0.5, 0.2, 0.15, 0.1, 0.05]).log()
    assert filtered_probs(logits).tolist() == pytest.approx([0.5, 0.2, 0.15, 0.1, 0.05])
    assert filtered_probs(logits, top_k=2).tolist() == pytest.approx([5 / 7, 2 / 7, 0, 0, 0])
    # 0.5 + 0.2 misses 0.75, so the third token belongs to the nucleus
    nucleus = filtered_probs(logits, top_p=0.75).tolist()
    assert nucleus == pytest.approx([0.5 / 0.85, 0.2 / 0.85, 0.15 / 0.85, 0, 0])
    # top-k first: of the renormalised pair the first alone reaches 0.7
    assert filtered_probs(logits, top_k=2, top_p=0.7).tolist() == pytest.approx([1, 0, 0, 0, 0])
    squared = torch.tensor([0.25, 0.04, 0.0225, 0.01, 0.0025])
    halved = filtered_probs(logits, temperature=0.5)
    torch.testing.assert_close(halved, squared / squared.sum())


def test_ties_with_the_last_token_kept_stay():
    logits = torch.tensor([0.1, 0.4, 0.1, 0.3, 0.1]).log()
    assert filtered_probs(logits, top_k=3).tolist() == pytest.approx([0.1, 0.4, 0.1, 0.3, 0.1])
    assert filtered_probs(logits, top_p=0.75).tolist() == pytest.approx([0.1, 0.4, 0.1, 0.3, 0.1])
    assert filtered_probs(logits, top_p=0.65).tolist() == pytest.approx([0, 4 / 7, 0, 3 / 7, 0])


def test_filters_agree_with_transformers():
    from transformers.generation.logits_process import (
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    logits = torch.randn(64, 50, generator=torch.Generator().manual_seed(1)) * 3
    scores = logits
    for warper in (TemperatureLogitsWarper(0.8), TopKLogitsWarper(20), TopPLogitsWarper(0.7)):
        scores = warper(None, scores)
    torch.testing.assert_close(filtered_probs(logits, 0.8, 20, 0.7), scores.softmax(-1))


def test_half_precision_logits_are_filtered_in_fp32():
    assert filtered_probs(torch.randn(4, 9).bfloat16(), 0.8, 3, 0.9).dtype == torch.float32


def test_a_distribution_needs_a_temperature():
    with pytest.raises(ValueError, match="temperature"):
        filtered_probs(torch.zeros(3), temperature=0)


@pytest.mark.parametrize(
    "wrong",
    [
        *({"temperature": value} for value in (-1, float("nan"), float("inf"), 1e-39, "0.7", None)),
        *({"top_p": value} for value in (0, 1.5, float("nan"))),
        *({"max_new_tokens": value} for value in (0, 2.5, True)),
    ],
)
def test_impossible_parameters_are_refused(wrong):
    with pytest.raises(UsageError, match=next(iter(wrong))):
        SamplingParams(**wrong)


def test_the_coolest_temperature_draws_and_0_is_greedy():
    assert SamplingParams().greedy
    assert not SamplingParams(temperature=COOLEST).greedy
    probs = filtered_probs(torch.tensor([80.0, -80.0, 79.0]), COOLEST)
    assert torch.equal(probs, torch.tensor([1.0, 0.0, 0.0]))


def test_uniforms_are_uniform_and_streams_independent(p_value):
    keys = torch.arange(100)[:, None].expand(100, 200)
    positions = torch.arange(200).expand(100, 200)
    draws = [uniform(3, keys, positions, stream) for stream in Stream]
    for values in draws:
        assert values.min() >= 0 and values.max() < 1
        cells = (values.flatten() * 100).long()
        assert p_value(torch.bincount(cells, minlength=100), torch.ones(100)) > 1e-3
    shifted = [draws[0].roll(1, dims) for dims in (0, 1)] + [uniform(4, keys, positions, Stream(0))]
    for left, right in [(0, 1), (0, 2), (1, 2)]:
        shifted.append(draws[right])
        pairs = torch.stack([draws[left].flatten(), draws[right].flatten()])
        assert torch.corrcoef(pairs)[0, 1].abs() < 0.03
    for other in shifted[:3]:
        joint = (draws[0] * 10).long() * 10 + (other * 10).long()
        assert p_value(torch.bincount(joint.flatten(), minlength=100), torch.ones(100)) > 1e-3


def test_draw_follows_the_distribution_and_skips_impossible_tokens(p_value):
    probs = torch.tensor([0.0, 0.3, 0.0, 0.6, 0.1, 0.0])
    uniforms = uniform(0, torch.arange(20000), torch.zeros(20000, dtype=torch.long), Stream.EMIT)
    tokens = draw(probs.expand(20000, 6), uniforms)
    assert p_value(torch.bincount(tokens, minlength=6), probs) > 1e-3
    edges = torch.tensor([0.0, 1 - 2.0**-48], dtype=torch.double)
    assert draw(probs.expand(2, 6), edges).tolist() == [1, 4]


def test_a_row_keeps_its_numbers_when_others_leave():
    sampler = Sampler(SamplingParams(temperature=1.0), keys=[7, 8, 9], device="cpu")
    before = sampler.uniform(torch.tensor([4, 4, 4]), Stream.EMIT)
    sampler.keep(torch.tensor([2]))
    assert sampler.uniform(torch.tensor([4]), Stream.EMIT).item() == before[2].item()
