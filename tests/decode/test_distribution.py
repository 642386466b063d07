"""Sampled speculation draws whole sequences from the target's own distribution."""

import pytest
import torch
from decode.heads import head_for

from mambactl.decode import accept, copying
from mambactl.decode.copying import Copying
from mambactl.decode.drafters import ModelDrafter, NgramDrafter
from mambactl.decode.engine import Engine
from mambactl.decode.head_drafter import HeadDrafter
from mambactl.decode.sampler import SamplingParams, filtered_probs

V = 5
PROMPT = [1, 4, 2, 3, 1, 4, 2]
ROWS = 6000
# tiny models are very sure of themselves, hence the high temperatures
SETTINGS = {
    "plain": SamplingParams(temperature=6.0, max_new_tokens=3, seed=1),
    "filtered": SamplingParams(temperature=8.0, top_k=4, top_p=0.9, max_new_tokens=3, seed=2),
}


@pytest.fixture(scope="module")
def models(make_hybrid):
    mixers = ["mamba2", "attention", "mamba1"]
    close = make_hybrid(mixers, seed=3, vocab_size=V)
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for parameter in close.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return {
        "target": make_hybrid(mixers, seed=3, vocab_size=V),
        "close": close,
        "unrelated": make_hybrid(["attention", "mamba2"], seed=21, vocab_size=V),
        "head": head_for(make_hybrid(mixers, seed=3, vocab_size=V)),
        "trimmed head": head_for(make_hybrid(mixers, seed=3, vocab_size=V), 3),
    }


def truth(target, params: SamplingParams) -> torch.Tensor:
    """The probability of every sequence of three tokens after PROMPT, [V, V, V], without cache."""
    pairs = torch.cartesian_prod(torch.arange(V), torch.arange(V))  # [V * V, 2]
    tokens = torch.cat([torch.tensor([PROMPT]).expand(V * V, -1), pairs], 1)
    with torch.no_grad():
        logits = target(input_ids=tokens, use_cache=False).logits[:, -3:]
    probs = filtered_probs(logits, params.temperature, params.top_k, params.top_p)
    first, second, third = probs.view(V, V, 3, V).unbind(2)  # [V, V, V] each
    return first[0, 0][:, None, None] * second[:, 0][:, :, None] * third


def sample(engine: Engine, params: SamplingParams) -> tuple[torch.Tensor, float]:
    """Counts [V, V, V] of three-token continuations over ROWS rows, and the acceptance rate."""
    result = engine.generate([PROMPT] * ROWS, params)
    tokens = torch.tensor(result.tokens)  # [ROWS, 3]
    cells = (tokens[:, 0] * V + tokens[:, 1]) * V + tokens[:, 2]
    return torch.bincount(cells, minlength=V**3).view(V, V, V), result.stats.acceptance


class AlwaysCopying(Copying):
    """Copies wherever anything can be copied."""

    def due(self, rows, k) -> bool:
        return True


@pytest.fixture(autouse=True)
def short_matches(monkeypatch) -> None:
    monkeypatch.setattr(copying, "MATCH", 1)


def engine_of(models, draft: str | None) -> Engine:
    if draft is None:
        return Engine(models["target"])
    if draft == "ngram":
        drafter = NgramDrafter()
    elif draft == "copied":
        beside = ModelDrafter(models["close"])
        return Engine(models["target"], beside, 2, copying=AlwaysCopying(0.2, 2))
    else:
        drafter = (HeadDrafter if draft.endswith("head") else ModelDrafter)(models[draft])
    return Engine(models["target"], drafter, 2)


HEAD = pytest.param("head", marks=pytest.mark.slow)
COPIED = pytest.param("copied", marks=pytest.mark.slow)
DRAFTS = ["close", "unrelated", "ngram", "trimmed head", COPIED, HEAD]


@pytest.mark.parametrize("draft", [None, *DRAFTS])
@pytest.mark.parametrize("setting", SETTINGS)
def test_sequences_follow_the_target(models, setting, draft, p_value):
    params = SETTINGS[setting]
    expected = truth(models["target"], params)
    assert expected.max() < 0.5
    counts, acceptance = sample(engine_of(models, draft), params)
    assert p_value(counts, expected) > 1e-3
    if draft is not None:
        assert 0.05 < acceptance < 0.98


@pytest.mark.parametrize("draft", [*DRAFTS[:3], HEAD])
def test_always_accepting_is_caught(models, draft, p_value, monkeypatch):
    monkeypatch.setattr(accept, "_leading", lambda matches, lengths: lengths)
    params = SETTINGS["plain"]
    counts, _ = sample(engine_of(models, draft), params)
    assert p_value(counts, truth(models["target"], params)) < 1e-6


@pytest.mark.parametrize("draft", [None, "close", "ngram", "trimmed head"])
def test_a_row_does_not_depend_on_its_batch(models, draft):
    params = SamplingParams(temperature=6.0, top_p=0.95, max_new_tokens=20, eos_token_ids=(0,))
    prompts = [PROMPT, PROMPT[:1], PROMPT * 9, PROMPT[:4]]
    engine = engine_of(models, draft)
    together = engine.generate(prompts, params, keys=[10, 11, 12, 13]).tokens
    assert len({len(row) for row in together}) > 1
    for row, prompt in enumerate(prompts):
        assert engine.generate([prompt], params, keys=[10 + row]).tokens == [together[row]]
    swapped = engine.generate(prompts[2:][::-1], params, keys=[13, 12]).tokens
    assert swapped == [together[3], together[2]]


def test_the_seed_and_the_key_decide(models):
    engine = engine_of(models, "close")
    base = SamplingParams(temperature=6.0, max_new_tokens=20, seed=4)
    other = SamplingParams(temperature=6.0, max_new_tokens=20, seed=5)
    first = engine.generate([PROMPT, PROMPT], base).tokens
    assert first == engine.generate([PROMPT, PROMPT], base).tokens
    assert first != engine.generate([PROMPT, PROMPT], other).tokens
    assert first[0] != first[1]
