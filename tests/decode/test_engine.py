"""Greedy decoding: plain equals recomputing everything, speculative equals plain, always."""

import pytest
import torch

from mambactl.decode.drafters import ModelDrafter, NgramDrafter
from mambactl.decode.engine import Engine
from mambactl.decode.sampler import SamplingParams
from mambactl.errors import ModelError, UsageError

TARGETS = {
    "attention": ["attention"] * 2,
    "mamba2": ["mamba2"] * 2,
    "mamba1": ["mamba1"] * 2,
    "mixed": ["mamba2", "attention", "mamba1"],
    "windowed": ["mamba2_window", "attention"],
    "kept heads": ["mamba2_mixed", "mamba2_window"],
}
LENGTHS = {1: [23], 4: [1, 300, 17, 64]}
GREEDY = SamplingParams(max_new_tokens=24)


def prompts_of(lengths: list[int], seed: int = 0) -> list[list[int]]:
    """Random prompts that repeat themselves, so that n-grams find something to copy."""
    generator = torch.Generator().manual_seed(seed)
    cycle = [torch.randint(3, 97, (12,), generator=generator).tolist() for _ in lengths]
    return [(tokens * (n // 12 + 1))[:n] for tokens, n in zip(cycle, lengths, strict=True)]


def recompute(model, prompt: list[int], params: SamplingParams) -> list[int]:
    """The argmax continuation with no cache at all."""
    tokens = list(prompt)
    for _ in range(params.max_new_tokens):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([tokens]), use_cache=False).logits
        tokens.append(logits[0, -1].argmax().item())
        if tokens[-1] in params.eos_token_ids:
            break
    return tokens[len(prompt) :]


def noisy_copy(make_hybrid, mixers: list[str], seed: int, noise: float = 0.01):
    """A draft that agrees with the target some of the time."""
    model = make_hybrid(mixers, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(noise * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture(scope="module")
def targets(make_hybrid):
    """name -> (model, batch size -> (prompts, plain greedy tokens))."""
    built = {}
    for name, mixers in TARGETS.items():
        model = make_hybrid(mixers, seed=11)
        plain = {}
        for batch, lengths in LENGTHS.items():
            prompts = prompts_of(lengths)
            plain[batch] = prompts, Engine(model).generate(prompts, GREEDY).tokens
        built[name] = model, plain
    return built


@pytest.mark.parametrize("name", TARGETS)
def test_plain_equals_recomputing_everything(targets, name):
    model, plain = targets[name]
    for prompts, tokens in plain.values():
        for prompt, continuation in zip(prompts, tokens, strict=True):
            assert continuation == recompute(model, prompt, GREEDY)


@pytest.mark.parametrize("name", TARGETS)
def test_plain_equals_generate_of_transformers(targets, name):
    model, plain = targets[name]
    prompts, tokens = plain[4]
    width = max(map(len, prompts))
    padded = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    out = model.generate(
        padded, attention_mask=mask, max_new_tokens=24, do_sample=False, eos_token_id=None
    )
    assert out[:, width:].tolist() == tokens


@pytest.mark.one_in(5)
@pytest.mark.parametrize("batch", LENGTHS)
@pytest.mark.parametrize("draft", ["itself", "unrelated", "noisy", "ngram"])
@pytest.mark.parametrize("name", TARGETS)
def test_speculation_equals_plain_for_every_k(targets, make_hybrid, name, draft, batch):
    model, plain = targets[name]
    prompts, expected = plain[batch]
    drafter = {
        "itself": lambda: ModelDrafter(model),
        "unrelated": lambda: ModelDrafter(make_hybrid(["mamba2", "attention"], seed=99)),
        "noisy": lambda: ModelDrafter(noisy_copy(make_hybrid, TARGETS[name], seed=11)),
        "ngram": NgramDrafter,
    }[draft]()
    rates = []
    for k in range(1, 9):
        result = Engine(model, drafter, k).generate(prompts, GREEDY)
        assert result.tokens == expected, f"k={k}"
        assert result.finish == ["length"] * batch
        rates.append(result.stats.acceptance)
    if draft == "itself":
        assert min(rates) == 1
    elif draft == "unrelated":
        assert max(rates) < 0.3
    elif draft == "noisy":
        assert 0.05 < min(rates) <= max(rates) < 0.98


@pytest.mark.parametrize("kind", ["attention", "mamba2", "mamba1", "mixed"])
def test_drafts_of_every_kind_help_a_mixed_target(targets, make_hybrid, kind):
    model, plain = targets["mixed"]
    prompts, expected = plain[4]
    drafter = ModelDrafter(make_hybrid(TARGETS[kind], seed=5))
    assert Engine(model, drafter, 3).generate(prompts, GREEDY).tokens == expected


@pytest.mark.parametrize("k", [1, 3, 8])
@pytest.mark.parametrize("draft", ["itself", "noisy", "ngram"])
def test_rows_stop_at_their_own_eos_also_inside_an_accepted_prefix(targets, make_hybrid, draft, k):
    model, plain = targets["mixed"]
    prompts, tokens = plain[4]
    # an id that some rows meet in the middle and others never
    params = SamplingParams(max_new_tokens=24, eos_token_ids=(tokens[0][9], tokens[2][4]))
    expected = [recompute(model, prompt, params) for prompt in prompts]
    assert 1 < min(map(len, expected)) < 24
    drafter = {
        "itself": lambda: ModelDrafter(model),
        "noisy": lambda: ModelDrafter(noisy_copy(make_hybrid, TARGETS["mixed"], seed=11)),
        "ngram": NgramDrafter,
    }[draft]()
    for engine in (Engine(model), Engine(model, drafter, k)):
        result = engine.generate(prompts, params)
        assert result.tokens == expected
        for row, finish in zip(result.tokens, result.finish, strict=True):
            assert (finish == "eos") == (row[-1] in params.eos_token_ids)


@pytest.mark.parametrize("budget", [1, 2, 3, 7])
@pytest.mark.parametrize("k", [1, 2, 5])
def test_the_budget_is_met_exactly(targets, k, budget):
    model, plain = targets["mixed"]
    prompts, tokens = plain[4]
    params = SamplingParams(max_new_tokens=budget)
    for drafter in (ModelDrafter(model), NgramDrafter()):
        result = Engine(model, drafter, k).generate(prompts, params)
        assert result.tokens == [row[:budget] for row in tokens]
        assert result.stats.tokens == budget * 4


def test_only_one_token_prompts(targets, make_hybrid):
    prompts = [[5], [6]]
    for name in TARGETS:
        model, _ = targets[name]
        expected = [recompute(model, prompt, GREEDY) for prompt in prompts]
        assert Engine(model).generate(prompts, GREEDY).tokens == expected
        drafter = ModelDrafter(noisy_copy(make_hybrid, TARGETS[name], seed=11))
        assert Engine(model, drafter, 4).generate(prompts, GREEDY).tokens == expected


def test_long_prompts_are_read_in_chunks(targets, monkeypatch):
    from mambactl.decode import prefill

    model, plain = targets["mixed"]
    prompts, expected = plain[4]
    monkeypatch.setattr(prefill, "CHUNK_TOKENS", 70 * len(prompts))
    assert Engine(model).generate(prompts, GREEDY).tokens == expected
    assert Engine(model, ModelDrafter(model), 3).generate(prompts, GREEDY).tokens == expected


def test_tokens_are_streamed_as_they_are_made(targets):
    model, plain = targets["mixed"]
    prompts, expected = plain[4]
    heard: list[list[int]] = [[] for _ in prompts]
    calls = []

    def listen(row: int, tokens: list[int]) -> None:
        heard[row].extend(tokens)
        calls.append(len(tokens))

    Engine(model, ModelDrafter(model), 3).generate(prompts, GREEDY, on_tokens=listen)
    assert heard == expected
    assert max(calls) == 4


def test_statistics_add_up(targets, make_hybrid):
    model, plain = targets["mixed"]
    prompts, _ = plain[4]
    drafter = ModelDrafter(noisy_copy(make_hybrid, TARGETS["mixed"], seed=11))
    stats = Engine(model, drafter, 3).generate(prompts, GREEDY).stats
    assert stats.tokens == 4 * 24 == stats.accepted + stats.row_steps + 4
    assert sum(stats.histogram.values()) == stats.row_steps
    assert sum(n * times for n, times in stats.histogram.items()) == stats.accepted
    assert stats.tokens_per_step == pytest.approx((stats.tokens - 4) / stats.row_steps)
    assert {"draft", "prefill", "verify"} <= stats.seconds.keys()
    plain_stats = Engine(model).generate(prompts, GREEDY).stats
    assert plain_stats.tokens_per_step == 1
    assert (plain_stats.drafted, plain_stats.acceptance, plain_stats.steps) == (0, 0, 23)


def test_different_vocabularies_are_refused(targets, make_hybrid):
    model, _ = targets["mixed"]
    other = make_hybrid(["mamba2"], seed=1, vocab_size=64)
    with pytest.raises(ModelError, match="64 and 97"):
        Engine(model, ModelDrafter(other), 2)


@pytest.mark.parametrize("size", [64, 128])
def test_a_vocabulary_padded_differently_may_draft(targets, make_hybrid, size):
    model, plain = targets["mixed"]
    prompts, expected = plain[4]
    drafter = ModelDrafter(make_hybrid(["mamba2"], seed=1, vocab_size=size), vocab_size=97)
    assert Engine(model, drafter, 3).generate(prompts, GREEDY).tokens == expected
    sampled = SamplingParams(temperature=1.0, max_new_tokens=12)
    assert max(map(max, Engine(model, drafter, 3).generate(prompts, sampled).tokens)) < 97


def test_an_empty_prompt_is_refused(targets):
    with pytest.raises(UsageError, match="prompt 1"):
        Engine(targets["mixed"][0]).generate([[3], []], GREEDY)


def test_k_and_drafter_belong_together(targets):
    with pytest.raises(ValueError):
        Engine(targets["mixed"][0], k=2)


def test_ngrams_copy_what_followed_the_latest_longest_match():
    from mambactl.decode.sampler import Sampler

    drafter = NgramDrafter()
    sampler = Sampler(GREEDY, [0, 1], "cpu")
    drafter.start([[1, 2, 3, 4, 9, 3, 5, 1, 2, 3], [7, 8]], sampler)
    proposal = drafter.propose([4, 4], torch.zeros(2, dtype=torch.long))
    # the three-token suffix wins over the later single 3
    assert proposal.tokens[0].tolist() == [4, 9, 3, 5]
    assert proposal.lengths.tolist() == [4, 0]
    drafter.start([[3, 8, 3, 9, 7, 3]], sampler)
    # of two equally long matches the later one
    assert drafter.propose([2], torch.zeros(1, dtype=torch.long)).tokens.tolist() == [[9, 7]]
    assert drafter.propose([1], torch.zeros(2, dtype=torch.long)).lengths.tolist() == [1]
