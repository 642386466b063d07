"""A conversation is read once: every prompt from the last one on, and the answers stay the same."""

import pytest
from decode.engines import NATIVE1, fused, plain

from mambactl.decode.conversation import MOST_POINTS
from mambactl.decode.sampler import SamplingParams
from mambactl.models.key_ring import WindowSettings

SPAN = WindowSettings(window=9, sinks=3)
MODELS = {
    "attention": {"mixers": ["attention", "mamba2"], "sliding_window": 40},
    "native": {"mixers": ["mamba1"] * 2, "mamba1": NATIVE1, "has_mlp": False},
    "kept heads": {"mixers": ["mamba2_mixed", "mamba2_window"], "mamba2_window": SPAN},
}
PARAMS = SamplingParams(max_new_tokens=9)
ASKED = [[5, 6, 7], [8] * 70, [9], [10, 11, 12, 13]]


@pytest.fixture(scope="module", params=MODELS)
def model(request, make_hybrid):
    return make_hybrid(**MODELS[request.param], seed=7)


@pytest.mark.parametrize("draft", [None, "ngram", "itself"])
def test_answers_are_those_of_whole_prompts(model, draft) -> None:
    """The reference reads no token twice; the other engine the last answer, in one pass."""
    helper, k = (model if draft == "itself" else draft), 0 if draft is None else 3
    for make in (plain, fused):
        engine, ids, before, answer = make(model, helper, k), [], 0, []
        engine.converse()
        for new in ASKED:
            ids = [*ids, *new]
            done = engine.generate([ids], PARAMS)
            assert done.tokens == plain(model).generate([ids], PARAMS).tokens
            # of the prompt before all but the last token was read, of the answer as well
            known = before + max(len(answer) - 1, 0) if make is plain else max(before - 1, 0)
            assert done.stats.prompt_shared == known
            before, answer = len(ids), done.tokens[0]
            ids = [*ids, *answer]


@pytest.mark.parametrize("ends", [1, 2, 3, 4, 5])
def test_an_answer_may_end_within_accepted_drafts(model, ends) -> None:
    """By an end token, a budget or a listener; what was read too much is taken back."""
    prompt = ASKED[1]
    whole = plain(model).generate([prompt], PARAMS).tokens[0]
    budget = SamplingParams(max_new_tokens=ends)
    eos = SamplingParams(max_new_tokens=9, eos_token_ids=(whole[ends],))
    for params in (budget, eos):
        engine = plain(model, model, 3)
        conversation = engine.converse()
        answer = engine.generate([prompt], params).tokens[0]
        held = conversation.points[-1].tokens
        assert held == [*prompt, *answer[:-1]] or (len(answer) == 1 and held == prompt[:-1])
        longer = [*prompt, *answer, 20, 21]
        assert (
            engine.generate([longer], PARAMS).tokens
            == plain(model).generate([longer], PARAMS).tokens
        )


def test_what_parts_is_read_from_the_last_point_before(make_hybrid) -> None:
    model = make_hybrid(["mamba2", "attention"])
    engine = plain(model)
    conversation = engine.converse()
    first = [5] * 20
    engine.generate([first], PARAMS)
    assert conversation.parted is None
    # the answer is rewritten
    second = [*first, 30, 31, 32, 33]
    done = engine.generate([second], PARAMS)
    assert conversation.parted == 20 and done.stats.prompt_shared == 19
    assert done.tokens == plain(model).generate([second], PARAMS).tokens
    # the same again needs nothing but its last token
    assert engine.generate([second], PARAMS).stats.prompt_shared == 23
    for number in range(MOST_POINTS):
        # a point stays what it is, however many prompts go on from it
        longer = [[*second, 40 + number, 50]]
        assert (
            engine.generate(longer, PARAMS).tokens == plain(model).generate(longer, PARAMS).tokens
        )
    assert len(conversation.points) == MOST_POINTS
    assert conversation.points[0].tokens == first[:-1]
    assert conversation.nbytes() > sum(p.cache.nbytes() for p in conversation.points[1:])
    conversation.clear()
    assert engine.generate([second], PARAMS).stats.prompt_shared == 0
