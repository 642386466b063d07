"""Beginnings that prompts share are read once, and nothing of what is written changes."""

import pytest
from decode.beginnings import MODELS, SHARED, asked, tokens
from decode.engines import fused, plain

from mambactl.decode.sampler import SamplingParams
from mambactl.decode.shared_prefix import LEAST_SHARED, Prefixes, common

PARAMS = SamplingParams(max_new_tokens=6)


@pytest.fixture(scope="module", params=MODELS)
def model(request, make_hybrid):
    return make_hybrid(**MODELS[request.param], seed=7)


@pytest.mark.parametrize("draft", [None, "ngram", "itself"])
def test_tokens_are_those_of_prompts_read_whole(model, draft) -> None:
    """Three batches of one beginning, one of another, and one that shares nothing."""
    batches = [asked([5, 0, 31]), asked([2]), asked([0, 0]), asked([4, 9], seed=1),
               [tokens(50, 3), tokens(90, 4)]]  # fmt: skip
    helper, k = (model if draft == "itself" else draft), 0 if draft is None else 3
    expected = [
        [plain(model).generate([prompt], PARAMS).tokens[0] for prompt in batch] for batch in batches
    ]
    for make in (plain, fused):
        engine, shared = make(model, helper, k), []
        for batch, wanted in zip(batches, expected, strict=True):
            done = engine.generate(batch, PARAMS)
            assert done.tokens == wanted
            assert done.stats.prompt_tokens == sum(map(len, batch))
            shared.append(done.stats.prompt_shared)
        assert shared == [2 * SHARED, SHARED, 2 * SHARED, SHARED, 0]


def test_a_beginning_is_read_again_where_prompts_share_less_or_much_more(make_hybrid) -> None:
    prefixes = Prefixes(make_hybrid(["mamba2"]).model)
    start = tokens(300, 0)
    # the first prompt alone shares nothing with anybody
    assert prefixes.of([start[:120]]) is None
    first = prefixes.of([[*start[:100], 5]])
    assert first.seen == len(prefixes.tokens) == 100 and prefixes.saved == 0
    assert prefixes.of([[*start[:110], 6], [*start[:110], 7]]) is first and prefixes.saved == 200
    less = prefixes.of([[*start[:90], 5, 5], [*start[:95], 6]])
    assert less.seen == 90 and first.seen == 100 and prefixes.saved == 290
    # what came before is not yet forgotten
    for seen in (95, 290):
        assert prefixes.of([[*start[:290], 5], [*start[:290], 6]]).seen == seen
    assert prefixes.of([start[:40], start[:30]]) is None


def test_single_prompts_share_what_is_short_beside_them(make_hybrid) -> None:
    engine = plain(make_hybrid(["mamba2"]))
    shared = [engine.generate([prompt], PARAMS).stats.prompt_shared for prompt in asked([200] * 4)]
    assert shared == [0, 0, SHARED, SHARED]
    assert engine.prefixes.of([tokens(90, 5)]) is None
    assert engine.prefixes.of([tokens(100, 6)]) is None


def test_a_prompt_keeps_its_last_token(make_hybrid) -> None:
    model = make_hybrid(["mamba2", "attention"])
    prompt = tokens(LEAST_SHARED + 1, 2)
    for make in (plain, fused):
        engine = make(model)
        expected = engine.generate([prompt], PARAMS).tokens
        assert engine.generate([prompt] * 3, PARAMS).tokens == expected * 3
        assert engine.generate([prompt] * 3, PARAMS).stats.prompt_shared == 3 * LEAST_SHARED


def test_common() -> None:
    assert common([[1, 2, 3], (1, 2, 4), [1, 2]]) == 2
    assert common([[1, 2, 3]]) == 3
    assert common([[2], [1]]) == common([[], [1]]) == 0
    assert common([[5, 1, 9], [5, 1, 2], [5, 3]]) == 1
