"""Decoding on a CPU in whole steps: the operations made for it against the plain engine."""

import pytest
import torch
from decode.engines import GREEDY, NATIVE2, ROTARY, SPAN, fused, noisy, plain, prompts_of

from mambactl import console
from mambactl.decode import backend
from mambactl.decode.draft_count import ExpectedTimes, LearnedChoice, StepTimes
from mambactl.decode.engine import Engine
from mambactl.decode.gpu.fused_engine import FusedEngine
from mambactl.decode.sampler import SamplingParams
from mambactl.kernels.decode.cpu.cpu_ops import CpuOps
from mambactl.kernels.decode.cpu.products import Products
from mambactl.kernels.decode.reference.ngram import draft_ngram

TARGETS = {
    "attention": {"mixers": ["attention"] * 2},
    "mamba2": {"mixers": ["mamba2"] * 2},
    "mamba1": {"mixers": ["mamba1", "attention"]},
    "native": {"mixers": ["mamba2"] * 2, "mamba2": NATIVE2, "has_mlp": False},
    "windowed": {"mixers": ["mamba2_window", "attention"], "mamba2_window": SPAN},
    "kept heads": {"mixers": ["mamba2_mixed", "attention"], "mamba2_window": SPAN},
    "rotary": {"mixers": ["mamba2"] * 2, "mamba2": ROTARY},
}
LENGTHS = [2, 17, 1, 64]
KS = (0, 1, 2, 3, 4, 6)


@pytest.fixture(scope="module")
def targets(make_hybrid):
    return {name: make_hybrid(**options, seed=11) for name, options in TARGETS.items()}


needs_bfloat16 = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="needs a CPU with AVX-512"
)


def on_cpu(target, draft=None, k=0) -> FusedEngine:
    return FusedEngine(target, draft, k, CpuOps(bfloat16=False))


@pytest.mark.parametrize("name", TARGETS)
def test_greedy_tokens_are_those_of_the_plain_engine(targets, make_hybrid, name) -> None:
    """Alone and in a batch, with drafts that survive partly, and with copies of the text."""
    target = targets[name]
    close = noisy(make_hybrid(**TARGETS[name], seed=11), 0.01)
    prompts = prompts_of(LENGTHS)
    expected = plain(target).generate(prompts, GREEDY).tokens
    assert on_cpu(target).generate(prompts, GREEDY).tokens == expected
    assert on_cpu(target).generate(prompts[1:2], GREEDY).tokens == expected[1:2]
    drafted = on_cpu(target, close, 3).generate(prompts, GREEDY)
    assert drafted.tokens == expected and 0 < drafted.stats.acceptance < 1
    copied = on_cpu(target, "ngram", 4).generate(prompts, GREEDY)
    assert copied.tokens == expected and copied.stats.drafted > 0


def test_sampled_tokens_are_those_of_the_reference(targets) -> None:
    target, prompts = targets["kept heads"], prompts_of([5, 30])
    params = SamplingParams(temperature=6.0, top_k=40, top_p=0.9, max_new_tokens=14, seed=2)
    for draft, k in ((None, 0), (targets["mamba2"], 2)):
        tokens = [engine(target, draft, k).generate(prompts, params).tokens
                  for engine in (on_cpu, fused)]  # fmt: skip
        assert tokens[0] == tokens[1]


def test_rows_that_ended_leave_the_others_alone(targets) -> None:
    target, prompts = targets["windowed"], prompts_of([9, 12, 30])
    whole = plain(target).generate(prompts, GREEDY).tokens
    params = SamplingParams(max_new_tokens=14, eos_token_ids=(whole[0][3], whole[2][6]))
    done, other = (e.generate(prompts, params) for e in (on_cpu(target), plain(target)))
    assert done.tokens == other.tokens and done.finish == other.finish
    assert "eos" in done.finish


def test_n_grams_are_those_of_the_reference() -> None:
    g = torch.Generator().manual_seed(0)
    # the bytes of the first lie between two of the second as well, which is no match
    words = torch.tensor([1 << 16, 1, 1 << 8, 7], dtype=torch.int32)
    history = words[torch.randint(0, 4, (40, 30), generator=g)]
    history[0, :6] = words[torch.tensor([1, 1, 2, 1, 3, 0])]
    lengths = torch.randint(1, 30, (40,), generator=g, dtype=torch.int32)
    lengths[0] = 6
    found = [(torch.zeros(40, 6, dtype=torch.int32), torch.zeros(40, dtype=torch.int32))
             for _ in range(2)]  # fmt: skip
    CpuOps(False).draft_ngram(history, lengths, found[0][0], 4, found[0][1])
    draft_ngram(history, lengths, found[1][0], 4, found[1][1])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*found, strict=True))
    assert 0 < int((found[0][1] > 0).sum()) < 40


@needs_bfloat16
def test_products_are_of_weights_in_bfloat16() -> None:
    g = torch.Generator().manual_seed(0)
    x, one, other = (torch.randn(*shape, generator=g) for shape in ((3, 64), (48, 40), (48, 24)))
    exact = x @ torch.cat([one, other], 1).T
    torch.testing.assert_close(Products(False)(x, one, other), exact)
    rounded = Products(True)
    assert 0 < float((rounded(x, one, other) - exact).abs().max()) < 0.02 * float(exact.abs().max())
    before = rounded(x, one, other)
    one.zero_()
    # the copy is kept
    assert torch.equal(rounded(x, one, other), before)


@needs_bfloat16
def test_the_largest_logits_are_exact() -> None:
    """bfloat16 alone rounds logits of 20 to multiples of an eighth."""
    g = torch.Generator().manual_seed(0)
    rows, width, vocabulary = 40, 48, 900
    hidden = torch.randn(rows, width, generator=g)
    # pairs of tokens that differ by less than a rounding
    head = torch.randn(vocabulary // 2, width, generator=g).repeat(2, 1)
    head += 1e-3 * torch.randn(head.shape, generator=g)
    squares = hidden.square().sum(1, keepdim=True)
    logits, best = [], []
    for ops in (CpuOps(True), CpuOps(False)):
        out, value = torch.empty(rows, vocabulary), torch.empty(rows, 1)
        index = torch.empty(rows, 1, dtype=torch.int32)
        ops.head_logits(hidden, squares, 1e-5, head, out)
        ops.head_best(hidden, squares, 1e-5, head, value, index)
        logits.append(out)
        best.append(index)
    top = logits[1].topk(5, 1)
    torch.testing.assert_close(logits[0].gather(1, top.indices), top.values)
    assert torch.equal(best[0], best[1])
    product = CpuOps(True).products(hidden, head)
    assert not torch.equal(product.argmax(1).int(), best[1][:, 0])


def test_which_engine_decodes_on_a_cpu(targets, make_hybrid, monkeypatch) -> None:
    monkeypatch.setattr("mambactl.kernels.decode.cpu.products.computes_bfloat16", lambda: True)
    target = targets["mamba2"]
    whole = backend.make_engine(target, None, 0)
    assert isinstance(whole, FusedEngine) and not whole.ops.products.bfloat16
    rounded = backend.make_engine(target, None, 0, rounded=True)
    assert rounded.ops.products.bfloat16 and backend.weight_bytes(rounded, target) == 2
    exact = backend.make_engine(target, None, 0, exact=True, rounded=True)
    assert backend.weight_bytes(exact, target) == 4
    assert isinstance(backend.make_engine(make_hybrid(["mamba2"]).double(), None, 0), Engine)
    monkeypatch.setenv("MAMBACTL_KERNELS", "reference")
    assert isinstance(backend.make_engine(target, None, 0), Engine)


def steps(choice: LearnedChoice, costs: dict[int, float], kept: float, count: int) -> list[int]:
    """Numbers that a choice drafts in `count` steps, if a draft is kept with probability `kept`."""
    g, found = torch.Generator().manual_seed(1), []
    for _ in range(count):
        k = choice.update()
        accepted = int((torch.rand(k, generator=g) < kept).long().cumprod(0).sum())
        choice.observe(k, accepted)
        choice.timed(k, costs[k], 1.0 + accepted)
        found.append(k)
    return found


def test_a_draft_as_slow_as_its_target_is_tried_twice() -> None:
    times = StepTimes()
    times.add(0, 1.0)
    choice = LearnedChoice(KS, times, model=True)
    drafted = steps(choice, {k: 1.0 + k for k in KS}, 1.0, 20)
    assert drafted == [1] * 2 + [0] * 18
    assert "drafts nothing" in choice.reason and "2.00 times a plain one" in choice.reason
    # what was measured is known to the next text
    assert LearnedChoice(KS, times, model=True).k == 0


def test_a_draft_that_pays_is_drafted_from() -> None:
    times = StepTimes()
    times.add(0, 1.0)
    choice = LearnedChoice(KS, times, model=True)
    drafted = steps(choice, {k: 1.0 + 0.1 * k for k in KS}, 0.9, 60)
    assert drafted[0] == 1 and set(drafted[10:]) <= {4, 6}
    assert choice.reason.startswith(f"drafts {choice.k} tokens a step: ")


@pytest.mark.parametrize(("kept", "ends"), [(0.0, 0), (0.9, 6)])
def test_n_grams_are_dropped_where_they_are_wrong(kept, ends) -> None:
    choice = LearnedChoice(KS, StepTimes(), model=False)
    drafted = steps(choice, {k: 1.0 + 0.05 * k for k in KS}, kept, 80)
    # the first steps are plain, as their time is what drafts are judged by
    assert drafted[:4] == [0, 0, 3, 3] and drafted[-1] == ends
    if ends == 0:
        wasted = sum(0.05 * k for k in drafted)
        assert wasted < 0.015 * 256


@pytest.mark.parametrize(
    ("every", "reason"),
    [
        (0, "drafts nothing: 0 of 8 steps found something to draft"),
        (8, "drafts little: 1 of 8 steps found something to draft"),
        (4, "3.09x plain decoding; 2 of 8 steps found something to draft"),
    ],
)
def test_rare_n_grams_are_said_to_be_rare(every, reason) -> None:
    choice = LearnedChoice(KS, StepTimes(), model=False)
    for number in range(10):
        k = choice.update()
        made = k if every and number % every == 1 and number > 1 else 0
        choice.observe(made, made)
        choice.timed(made, 1.0 + 0.1 * made, 1.0 + made)
    choice.update()
    assert choice.reason.endswith(reason)


def test_text_without_repetition_is_said_to_hold_no_drafts(targets, monkeypatch) -> None:
    """By the real engine, once and with no empty line for a text that is too short to tell."""
    said: list[str] = []
    monkeypatch.setattr(console, "log", lambda message, level=1: said.append(message))
    module = "mambactl.kernels.decode.cpu.cpu_ops"
    monkeypatch.setattr(f"{module}._follower", lambda text, longest: len(text))
    engine = on_cpu(targets["attention"], "ngram", "auto")
    for tokens in (12, 2, 12):
        engine.generate(prompts_of([9]), SamplingParams(max_new_tokens=tokens))
    assert said == ["drafts nothing: 0 of 9 steps found something to draft"]


def test_what_is_lost_ends_drafting_whatever_drafts_promise() -> None:
    """Long steps that were not seen when the choice was made."""
    times = StepTimes()
    times.add(0, 1.0)
    choice = LearnedChoice(KS, times, model=True)
    assert steps(choice, dict.fromkeys(KS, 1.05), 1.0, 30)[-1] == 6
    drafted = []
    for _ in range(5):
        drafted.append(choice.update())
        choice.timed(6, 1.05, 0.3)
    assert drafted == [6, 6, 6, 0, 0]
    assert choice.reason == "drafts nothing: drafting took 3.8 plain steps more than it gave"


def test_sampled_text_does_not_follow_the_clock(targets) -> None:
    params = SamplingParams(temperature=0.8, max_new_tokens=20, seed=4)
    target, prompts = targets["mamba2"], prompts_of([9])
    clock, drafted = StepTimes.add, []
    for delay in (0.0, 1e9):
        engine = on_cpu(target, targets["attention"], "auto")

        def late(times, k, seconds, delay=delay):
            clock(times, k, seconds + delay)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(StepTimes, "add", late)
            done = engine.generate(prompts, params)
        drafted.append((done.tokens, dict(done.stats.lengths)))
    assert drafted[0] == drafted[1]
    times = ExpectedTimes(draft=0.1)
    found = steps(LearnedChoice(KS, times, model=True), dict.fromkeys(KS, 99.0), 0.95, 30)
    assert found[-1] in (4, 6)
    found = steps(LearnedChoice(KS, ExpectedTimes(1.0), model=True), dict.fromkeys(KS, 0.0), 1.0, 9)
    assert found == [1, 1] + [0] * 7


def test_a_useless_draft_is_dropped_at_once(targets, monkeypatch) -> None:
    """By the real engine, which says so once."""
    said: list[str] = []
    monkeypatch.setattr(console, "log", lambda message, level=1: said.append(message))
    # a draft token takes as long as a step, whatever else this machine does
    add = StepTimes.add
    monkeypatch.setattr(StepTimes, "add", lambda times, k, _: add(times, k, 1.0 + k))
    target = targets["attention"]
    engine = on_cpu(target, noisy_copy(target), "auto")
    params = SamplingParams(max_new_tokens=40)
    prompts = prompts_of([9])
    done = engine.generate(prompts, params)
    assert done.tokens == plain(target).generate(prompts, params).tokens
    # the first token is the prompt's; two steps have a draft
    assert done.stats.lengths[0] >= 35 and done.stats.drafted == 2
    assert len(said) == 1 and said[0].startswith("drafts nothing: ")
    again = engine.generate(prompts, params)
    assert again.stats.drafted == 0 and len(said) == 1


def noisy_copy(target):
    """A draft that costs as much as its target."""
    from copy import deepcopy

    return noisy(deepcopy(target), 0.5)
