"""The engine of whole steps on the device, with the reference kernels, against the plain engine.

Its arithmetic is another one (fp32 sums in another order), yet greedy tokens are equal here, as no
logits of these models are closer than that; so are sampled ones, as no random number lies so near
a border between two tokens. The last sampled token may differ: the plain engine drafts no token at
the end of the budget, this one does, and the same token then is drawn by another random number.
"""

import pytest
import torch
from decode.engines import (
    GREEDY,
    NATIVE1,
    NATIVE2,
    ROTARY,
    SPAN,
    fused,
    plain,
    prompts_of,
    rows_one_by_one,
)
from decode.memory import assert_same_memory, poisoned

from mambactl.decode.gpu.fused_engine import FusedEngine
from mambactl.decode.gpu.session import Session
from mambactl.decode.sampler import SamplingParams
from mambactl.errors import UsageError
from mambactl.kernels.decode.reference.verdict import Field
from mambactl.models.key_ring import WindowSettings
from mambactl.models.mixers.mamba1 import Mamba1Settings
from mambactl.models.mixers.mamba2_decode import Mamba2Settings

TARGETS = {
    "attention": {"mixers": ["attention"] * 2},
    "mamba2": {"mixers": ["mamba2"] * 2},
    "mamba1": {"mixers": ["mamba1"] * 2},
    "mixed": {"mixers": ["mamba2", "attention", "mamba1"]},
    "native1": {"mixers": ["mamba1"] * 2, "mamba1": NATIVE1, "has_mlp": False},
    "native2": {"mixers": ["mamba2"] * 2, "mamba2": NATIVE2, "has_mlp": False},
    "windowed": {"mixers": ["mamba2_window", "attention"], "mamba2_window": SPAN},
    "kept heads": {"mixers": ["mamba2_mixed", "attention"], "mamba2_window": SPAN},
    "rotary": {"mixers": ["mamba2"] * 2, "mamba2": ROTARY},
}
COUNTS = ("steps", "row_steps", "drafted", "accepted", "rejections", "histogram", "lengths")
LENGTHS = {1: [23], 3: [2, 17, 1], 4: [1, 64, 17, 2]}
SAMPLED = {
    "plain": SamplingParams(temperature=6.0, max_new_tokens=14, seed=1),
    "filtered": SamplingParams(temperature=8.0, top_k=40, top_p=0.9, max_new_tokens=14, seed=2),
}


@pytest.fixture(scope="module")
def build(make_hybrid):
    """build(name, noise=0): a target, or a copy that agrees with it some of the time."""

    def make(name: str, noise: float = 0.0):
        model = make_hybrid(**TARGETS[name], seed=11)
        g = torch.Generator().manual_seed(12)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(noise * torch.randn(parameter.shape, generator=g))
        return model

    return make


@pytest.fixture(scope="module")
def models(build, make_hybrid):
    """name -> (target, drafts by name)."""
    unrelated = make_hybrid(["mamba2", "attention"], seed=99)
    built = {}
    for name in TARGETS:
        target = build(name)
        drafts = {"itself": target, "noisy": build(name, 0.01), "unrelated": unrelated}
        built[name] = target, drafts | {"ngram": "ngram"}
    return built


@pytest.fixture(scope="module")
def expected(models):
    """(name, batch) -> prompts and plain greedy tokens."""
    results = {}
    for name, (target, _) in models.items():
        for batch, lengths in LENGTHS.items():
            prompts = prompts_of(lengths)
            results[name, batch] = prompts, plain(target).generate(prompts, GREEDY).tokens
    return results


def both(target, draft, k: int, prompts, params) -> tuple:
    """Results of both engines, and what each said by and by."""
    results = []
    for engine in (fused(target, draft, k), plain(target, draft, k)):
        calls: list = []
        done = engine.generate(prompts, params, lambda row, new, c=calls: c.append((row, [*new])))
        results += [done, calls]
    return tuple(results)


@pytest.mark.parametrize("name", TARGETS)
def test_plain_decoding_gives_the_plain_tokens(models, expected, name) -> None:
    target, _ = models[name]
    for batch in LENGTHS:
        prompts, tokens = expected[name, batch]
        done, calls, other, others_calls = both(target, None, 0, prompts, GREEDY)
        assert done.tokens == other.tokens == tokens
        assert done.finish == other.finish == ["length"] * batch
        assert calls == others_calls
        for field in (
            "rows",
            "prompt_tokens",
            "tokens",
            "at_once",
            "steps",
            "row_steps",
            "drafted",
        ):
            assert getattr(done.stats, field) == getattr(other.stats, field), field
        # the first token is the prompt's
        assert done.stats.histogram == other.stats.histogram == {0: 13 * batch}
        assert done.stats.tokens_per_step == 1


@pytest.mark.one_in(3)
@pytest.mark.parametrize("draft", ["itself", "noisy", "unrelated", "ngram"])
@pytest.mark.parametrize("name", TARGETS)
def test_speculation_gives_the_plain_tokens(models, expected, name, draft) -> None:
    target, drafts = models[name]
    rates = []
    for k, batch in ((1, 3), (2, 1), (3, 4), (5, 1), (8, 3)):
        prompts, tokens = expected[name, batch]
        done = fused(target, drafts[draft], k).generate(prompts, GREEDY)
        assert done.tokens == tokens, f"k={k}"
        assert done.finish == ["length"] * batch
        rates.append(done.stats.acceptance)
    if draft == "itself":
        assert min(rates) == 1
    elif draft == "unrelated":
        assert max(rates) < 0.4
    elif draft == "noisy":
        assert 0.02 < min(rates) <= max(rates)


@pytest.mark.parametrize("draft", ["itself", "noisy", "ngram"])
@pytest.mark.parametrize("k", [1, 3, 8])
def test_steps_and_streams_are_those_of_the_plain_engine(models, expected, draft, k) -> None:
    """Up to the budget's end, where only this engine still drafts."""
    target, drafts = models["mixed"]
    prompts, tokens = expected["mixed", 4]
    done, calls, other, others_calls = both(target, drafts[draft], k, prompts, GREEDY)
    assert done.tokens == tokens
    assert calls == others_calls
    stats, others = done.stats, other.stats
    assert (stats.steps, stats.row_steps) == (others.steps, others.row_steps)
    assert sum(stats.histogram.values()) == sum(stats.lengths.values()) == stats.row_steps
    assert sum(n * times for n, times in stats.histogram.items()) == stats.accepted
    assert sum(n * times for n, times in stats.lengths.items()) == stats.drafted
    assert 0 <= stats.accepted - others.accepted <= 4 * k
    assert stats.tokens == 4 * 14 <= stats.accepted + stats.row_steps + stats.at_once
    if draft != "ngram":
        assert stats.drafted == k * stats.row_steps
    assert {"prefill", "verify"} <= stats.seconds.keys()


@pytest.mark.parametrize("k", [1, 3, 8])
@pytest.mark.parametrize("draft", ["itself", "noisy", "ngram"])
def test_rows_stop_at_their_own_eos_also_inside_accepted_drafts(models, expected, draft, k) -> None:
    target, drafts = models["mixed"]
    prompts, tokens = expected["mixed", 4]
    # met early, in the middle and, by the last row, never
    ends = (tokens[0][8], tokens[1][4], tokens[2][2])
    params = SamplingParams(max_new_tokens=40, eos_token_ids=(*ends, tokens[3][9]))
    done, calls, other, others_calls = both(target, drafts[draft], k, prompts, params)
    assert done.tokens == other.tokens
    assert done.finish == other.finish == ["eos"] * 4
    assert len({len(row) for row in done.tokens}) > 1
    assert calls == others_calls
    # no budget ends, so all numbers are the same
    for field in COUNTS:
        assert getattr(done.stats, field) == getattr(other.stats, field), field


@pytest.mark.parametrize("budget", [1, 2, 5])
@pytest.mark.parametrize("k", [0, 2, 5])
def test_the_budget_is_met_exactly(models, expected, k, budget) -> None:
    target, drafts = models["mixed"]
    prompts, tokens = expected["mixed", 3]
    params = SamplingParams(max_new_tokens=budget, eos_token_ids=(tokens[0][budget - 1],))
    for draft in ("itself", "ngram") if k else (None,):
        done = fused(target, drafts.get(draft), k).generate(prompts, params)
        cut = [row[:budget] for row in tokens]
        assert [row[: len(one)] for row, one in zip(cut, done.tokens, strict=True)] == done.tokens
        # the last token of the budget may be an end too
        assert done.finish[0] == "eos" and done.tokens[0] == cut[0]
        assert done.stats.tokens == sum(map(len, done.tokens))


def test_several_calls_and_a_capacity_that_grows(models) -> None:
    target, drafts = models["mixed"]
    engine = fused(target, drafts["noisy"], 3)
    # one row uses the memory of two, but not that of five
    batches = (([17], 1), ([5, 300], 2), ([17], 2), ([2, 9, 4, 1, 30], 5), ([17], 1), ([290, 3], 2))
    for lengths, size in batches:
        prompts = prompts_of(lengths, seed=len(lengths))
        done = engine.generate(prompts, GREEDY)
        assert done.tokens == plain(target).generate(prompts, GREEDY).tokens, lengths
        (session,) = engine.sessions.values()
        assert session.size == size
        assert session.capacity >= max(lengths) + 14 + 5


@pytest.mark.parametrize(
    "changes",
    [
        {"sliding_window": 8, "attention_bias": True},
        {"attention_bias": ["k", "o"]},
        {"tie_word_embeddings": True, "num_key_value_heads": 4, "head_dim": 24},
        {"mamba2": Mamba2Settings(4, 8, 12, 4, 2, 4, norm_groups=2, d_conv=3, conv_bias=False)},
        {"mamba1": Mamba1Settings(32, 5, 8, x_dim=16, repeat_width=4, d_conv=2, proj_bias=True)},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    ],
    ids=["window", "biases", "tied", "mamba2", "mamba1", "rope"],
)  # fmt: skip
def test_other_shapes(make_hybrid, changes) -> None:
    mixers = ["mamba2", "attention", "mamba1"]
    target = make_hybrid(mixers, seed=21, **changes)
    prompts = prompts_of([23, 1, 2], seed=9)
    tokens = plain(target).generate(prompts, GREEDY).tokens
    draft = make_hybrid(["attention", "mamba1", "mamba2"], seed=22, **changes)
    for drafting, k in ((None, 0), (draft, 3), ("ngram", 2)):
        assert fused(target, drafting, k).generate(prompts, GREEDY).tokens == tokens


@pytest.mark.parametrize("draft", ["noisy", None])
def test_batches_that_store_states_lazily(models, draft) -> None:
    """From eight sequences on several steps are replayed."""
    for name in ("mamba2", "mixed", "windowed", "rotary"):
        target, drafts = models[name]
        prompts = prompts_of([5, 1, 9, 2, 17, 3, 4, 12, 7], seed=10)
        done = fused(target, drafts.get(draft), 2 if draft else 0).generate(prompts, GREEDY)
        assert done.tokens == plain(target).generate(prompts, GREEDY).tokens


@pytest.mark.parametrize("size", [64, 128])
def test_a_vocabulary_padded_differently_may_draft(models, expected, make_hybrid, size) -> None:
    target, _ = models["mixed"]
    prompts, tokens = expected["mixed", 4]
    draft = make_hybrid(["mamba2"], seed=1, vocab_size=size)
    assert fused(target, draft, 3).generate(prompts, GREEDY).tokens == tokens
    for params in SAMPLED.values():
        done, _, other, _ = both(target, draft, 2, prompts, params)
        assert [row[:-1] for row in done.tokens] == [row[:-1] for row in other.tokens]


@pytest.fixture
def launched(monkeypatch) -> list[int]:
    """The number of drafts of every step."""
    ks: list[int] = []
    launch = Session.launch

    def heard(session, k, sampled, copied=False):
        ks.append(k)
        return launch(session, k, sampled, copied)

    monkeypatch.setattr(Session, "launch", heard)
    return ks


def pretend(monkeypatch, seconds: dict[int, float]) -> None:
    monkeypatch.setattr(Session, "time_steps", lambda session, ks, sampled: seconds)


LONG = SamplingParams(max_new_tokens=40)


def test_auto_drafts_nothing_where_steps_with_drafts_are_slow(
    models, monkeypatch, launched
) -> None:
    target, drafts = models["mixed"]
    pretend(monkeypatch, {k: 1.0 + 2 * k for k in (0, 1, 2, 3, 4, 6)})
    prompts = prompts_of(LENGTHS[3])
    done = fused(target, drafts["itself"], "auto").generate(prompts, LONG)
    assert done.tokens == plain(target).generate(prompts, LONG).tokens
    assert set(launched) == {0} and done.stats.drafted == 0


@pytest.mark.parametrize("name", ["mixed", "native1"])
@pytest.mark.parametrize("draft", ["unrelated", "ngram"])
def test_auto_gives_up_a_draft_that_does_not_pay(
    models, monkeypatch, launched, name, draft
) -> None:
    target, drafts = models[name]
    pretend(monkeypatch, {k: 1.0 + 0.4 * k for k in (0, 1, 2, 3, 4, 6)})
    prompts = prompts_of([7, 11, 3], seed=3)
    if draft == "ngram":
        # every token of the prompt occurs twice, so that there is something to copy
        prompts = [[*row, *row] for row in prompts]
    done = fused(target, drafts[draft], "auto").generate(prompts, LONG)
    assert done.tokens == plain(target).generate(prompts, LONG).tokens
    assert launched[0] > 0
    if draft == "unrelated":
        first = launched.index(0)
        assert 0 < first < 10 and set(launched[first:]) == {0}


def test_auto_keeps_a_good_draft(models, monkeypatch, launched) -> None:
    target, drafts = models["mixed"]
    pretend(monkeypatch, {k: 1.0 + 0.1 * k for k in (0, 1, 2, 3, 4, 6)})
    prompts = prompts_of(LENGTHS[4])
    done = fused(target, drafts["itself"], "auto").generate(prompts, LONG)
    assert done.tokens == plain(target).generate(prompts, LONG).tokens
    assert launched[-1] == 6


@pytest.mark.parametrize("params", [LONG, SamplingParams(max_new_tokens=40, temperature=1.0)])
def test_auto_begins_a_greedy_text_with_what_the_last_one_taught(
    models, monkeypatch, launched, params
) -> None:
    target, drafts = models["mixed"]
    pretend(monkeypatch, {k: 1.0 + 0.4 * k for k in (0, 1, 2, 3, 4, 6)})
    engine, counts = fused(target, drafts["unrelated"], "auto"), []
    for _ in range(2):
        launched.clear()
        engine.generate(prompts_of([7, 11, 3], seed=3), params)
        counts.append(sum(k > 0 for k in launched))
    first, second = counts
    # what is drawn follows from the number of drafts, so that it begins alike each time
    assert first > 0 and second == (0 if params.greedy else first)


def test_steps_are_timed_once(models, launched) -> None:
    target, drafts = models["mixed"]
    engine = fused(target, drafts["itself"], "auto")
    prompts = prompts_of([7, 11], seed=3)
    engine.generate(prompts, LONG)
    (session,) = engine.sessions.values()
    times = session.time_steps([0, 2], sampled=False)
    launched.clear()
    assert session.time_steps([0, 2], sampled=False) == times and not launched


@pytest.mark.one_in(3)
@pytest.mark.parametrize("setting", SAMPLED)
@pytest.mark.parametrize("draft", [None, "itself", "noisy", "ngram"])
@pytest.mark.parametrize("name", ["mixed", "native1", "native2", "windowed"])
def test_sampled_tokens_are_those_of_the_plain_engine(models, name, draft, setting) -> None:
    target, drafts = models[name]
    prompts, params = prompts_of(LENGTHS[4], seed=5), SAMPLED[setting]
    for k in (1, 3) if draft else (0,):
        done, _, other, _ = both(target, drafts.get(draft), k, prompts, params)
        end = -1 if draft else None
        assert [row[:end] for row in done.tokens] == [row[:end] for row in other.tokens]
        assert done.stats.steps == other.stats.steps


@pytest.mark.parametrize("draft", [None, "noisy", "ngram"])
def test_a_sampled_row_does_not_depend_on_its_batch(models, draft) -> None:
    target, drafts = models["mixed"]
    params = SamplingParams(temperature=6.0, top_p=0.95, max_new_tokens=15, eos_token_ids=(0, 7, 9))
    prompts = prompts_of([7, 1, 60, 4, 2], seed=6)
    engine = fused(target, drafts.get(draft), 2 if draft else 0)
    together = engine.generate(prompts, params, keys=[10, 11, 12, 13, 14]).tokens
    assert len({len(row) for row in together}) > 1
    for row, prompt in enumerate(prompts):
        assert engine.generate([prompt], params, keys=[10 + row]).tokens == [together[row]]
    swapped = engine.generate(prompts[2:4][::-1], params, keys=[13, 12]).tokens
    assert swapped == [together[3], together[2]]


def assert_same_states(engine: FusedEngine, other: FusedEngine, prompt, done) -> None:
    """The stored states, and what else is held, are those of `other`, without drafts, after as
    many tokens.
    """
    session = engine.sessions[1]
    base = int(session.batch.field(Field.BASE)[0])
    written = base - (len(prompt) - 1)
    assert len(done.tokens[0]) // 2 < written
    again = other.generate([prompt], SamplingParams(max_new_tokens=written))
    assert again.tokens[0] == done.tokens[0][:written]
    assert int(other.sessions[1].batch.field(Field.BASE)[0]) == base
    assert assert_same_memory(session, other.sessions[1], 0, len(prompt))


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("name", ["mamba2", "native2", "rotary"])
def test_states_never_hear_of_rejected_drafts(models, monkeypatch, name, k) -> None:
    rows_one_by_one(monkeypatch)
    target, drafts = models[name]
    engine = fused(target, drafts["noisy"], k)
    prompt = prompts_of([19], seed=8)[0]
    done = engine.generate([prompt], LONG)
    assert done.stats.rejections > 2 and done.stats.accepted > 2
    assert_same_states(engine, fused(target), prompt, done)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("mixers", [["mamba2_mixed"], ["mamba2", "attention", "mamba1"]])
def test_device_kernels_in_the_interpreter(make_hybrid, monkeypatch, mixers) -> None:
    """The only test here of the real kernels: slow, so tiny. Tokens, and memory bit for bit, in
    memory that holds NaN.
    """
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("kernels are compiled here: see test_fused_gpu.py")
    from mambactl.kernels.decode.triton.ops import TritonOps

    rotary = "mamba2_mixed" in mixers
    sizes = {"hidden_size": 32, "intermediate_size": 24, "vocab_size": 40, "mamba1": NATIVE1,
             "num_attention_heads": 2, "num_key_value_heads": 1 + rotary,
             "mamba2": Mamba2Settings(2, 8, 16, 1, 1, 2, norm_groups=2, rotary=rotary),
             "mamba2_window": WindowSettings(3, sinks=1)}  # fmt: skip
    target = make_hybrid(mixers, seed=4, **sizes)
    draft = make_hybrid(["mamba2"], seed=5, **sizes)
    params, prompt = SamplingParams(max_new_tokens=5), [5, 9, 11, 5, 9]
    plainly = FusedEngine(target, None, 0, TritonOps(exact=True))
    engine = FusedEngine(target, draft, 2, TritonOps(exact=True))
    with poisoned(monkeypatch):
        done = engine.generate([prompt], params)
        assert_same_states(engine, plainly, prompt, done)
    assert done.tokens == plain(target).generate([prompt], params).tokens
    assert done.stats.rejections > 0
    prompts, params = [[5], prompt], SamplingParams(temperature=6.0, max_new_tokens=2)
    done = FusedEngine(target, "ngram", 1, TritonOps()).generate(prompts, params)
    other = plain(target, "ngram", 1).generate(prompts, params)
    assert [row[:-1] for row in done.tokens] == [row[:-1] for row in other.tokens]


def test_what_is_refused(models) -> None:
    target, drafts = models["mixed"]
    with pytest.raises(ValueError, match="draft"):
        fused(target, None, 2)
    with pytest.raises(ValueError, match="draft"):
        fused(target, drafts["noisy"], 0)
    with pytest.raises(UsageError, match="prompt 1"):
        fused(target).generate([[3], []], GREEDY)
    with pytest.raises(UsageError, match="vocabulary ends at 96"):
        fused(target).generate([[3, 97]], GREEDY)
    with pytest.raises(UsageError, match="end tokens"):
        fused(target).generate([[3]], SamplingParams(eos_token_ids=tuple(range(65))))
