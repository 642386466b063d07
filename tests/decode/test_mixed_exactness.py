"""Layers of kept heads, windows and states: speculation against plain decoding, bit for bit."""

import pytest
from decode.engines import fused, noisy, plain, prompts_of, rows_one_by_one
from decode.memory import assert_exact, poisoned

from mambactl.decode.equality import first_differences
from mambactl.decode.sampler import SamplingParams
from mambactl.models.key_ring import WindowSettings

# one kept head in the first layer, another in the second; then a window alone
MIXERS = ["mamba2_mixed", "mamba2_mixed", "mamba2_window"]
# rings of windows of this size have room for few drafts before they need another 16 slots
SPAN = WindowSettings(window=14, sinks=3)


@pytest.fixture(scope="module")
def target(make_hybrid):
    return make_hybrid(MIXERS, seed=31, mamba2_window=SPAN)


@pytest.fixture(scope="module")
def similar(make_hybrid):
    """A small hybrid that agrees with the target some of the time."""
    return noisy(make_hybrid(MIXERS, seed=31, mamba2_window=SPAN), 0.02)


@pytest.mark.parametrize("batch", [1, 4, pytest.param(32, marks=pytest.mark.slow)])
def test_the_reference_engine_writes_the_same_tokens_with_every_draft(
    target, similar, make_hybrid, batch
) -> None:
    """In fp32 no logits of this model are so close that the order of a sum decides."""
    lengths = [(7 * row) % 23 + 1 for row in range(batch - 1)] + [40]
    prompts, params = prompts_of(lengths, seed=2), SamplingParams(max_new_tokens=12)
    expected = plain(target).generate(prompts, params).tokens
    other = make_hybrid(["mamba2_mixed", "attention"], seed=33)
    drafts = {"itself": target, "similar": similar, "other": other, "ngram": "ngram"}
    for name, draft in drafts.items():
        for k in (1, 4):
            done = plain(target, draft, k).generate(prompts, params)
            assert first_differences(expected, done.tokens) == {}, (name, k)
            if name == "itself":
                assert done.stats.rejections == 0
            elif k == 4:
                assert done.stats.rejections > 0, name
            if name == "similar" and batch > 1:
                assert done.stats.accepted > 0


@pytest.mark.parametrize(("batch", "k", "draft"), [(1, 5, "ngram"), (3, 3, "similar")])
def test_tokens_and_memory_are_those_of_plain_decoding(
    target, similar, monkeypatch, draft, batch, k
) -> None:
    """With reference kernels that compute each row by itself, in memory that holds NaN."""
    rows_one_by_one(monkeypatch)
    drafting = draft if draft == "ngram" else similar
    prompts, params = prompts_of([19, 1, 33][:batch], seed=8), SamplingParams(max_new_tokens=14)
    with poisoned(monkeypatch):
        engine, plainly = fused(target, drafting, k), fused(target)
        done = assert_exact(engine, plainly, prompts, params)
    assert done.stats.rejections > 2
