"""The engine on a GPU: device kernels, whole steps as CUDA graphs, scripted models.

Scripted models know the right token after every token (see `speed.shapes`), so every token
of a long run is checked, whatever the precision.
"""

import pytest
import torch
from decode.exact_speculation import close_pair, require_exact

from mambactl.decode.engine import Engine
from mambactl.decode.gpu import fused_engine as fused_engine
from mambactl.decode.gpu.fused_engine import FusedEngine
from mambactl.decode.sampler import SamplingParams
from mambactl.models.mixers.mamba2_decode import Mamba2Settings
from mambactl.models.packed import RecurrentState
from mambactl.speed.shapes import build, disagreeing, first_wrong, successors

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

V, ACCEPTANCE = 512, 0.7
BATCHES = [1, 4, 32]


@pytest.fixture(scope="module")
def successor() -> torch.Tensor:
    return successors(V, seed=1)


@pytest.fixture(scope="module")
def draft(successor):
    """Right about 0.7 of the tokens."""
    wrong = disagreeing(successor, 1 - ACCEPTANCE, seed=2)
    return build("tiny-draft", "cuda", torch.bfloat16, seed=9, successor=wrong)


@pytest.fixture(autouse=True)
def _no_hidden_waiting(monkeypatch) -> None:
    """While steps run, an operation that waits for the GPU without saying so is an error."""
    finish = fused_engine._Run.finish

    def guarded(run) -> None:
        torch.cuda.set_sync_debug_mode("error")
        try:
            finish(run)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(fused_engine._Run, "finish", guarded)


def prompts_of(batch: int, seed: int = 0) -> list[list[int]]:
    """Prompts of 1 to 40 random tokens."""
    g = torch.Generator().manual_seed(seed)
    lengths = [1, *torch.randint(2, 41, (batch - 1,), generator=g).tolist()]
    return [torch.randint(3, V, (n,), generator=g).tolist() for n in lengths]


def assert_follows(prompts, done, successor, budget: int) -> None:
    assert done.finish == ["length"] * len(prompts)
    for prompt, tokens in zip(prompts, done.tokens, strict=True):
        assert len(tokens) == budget
        assert first_wrong([prompt[-1], *tokens], successor) is None


@pytest.mark.parametrize("k", [0, 3])
@pytest.mark.parametrize(
    "name", ["tiny-hybrid", "tiny-mamba", "tiny-mamba2", "tiny-window", "tiny-heads", "tiny-rotary"]
)
def test_every_token_of_a_long_run_is_right(ops, successor, draft, name, k) -> None:
    target = build(name, "cuda", torch.bfloat16, successor=successor)
    engine = FusedEngine(target, draft if k else None, k, ops())
    for batch in BATCHES:
        prompts = prompts_of(batch, seed=batch)
        done = engine.generate(prompts, SamplingParams(max_new_tokens=2000))
        assert_follows(prompts, done, successor, 2000)
        if k:
            assert abs(done.stats.acceptance_per_token - ACCEPTANCE) < 0.05
        assert set(engine.sessions) == {batch}
        assert engine.sessions[batch].capture.graphs == 1


def test_ngrams_and_an_automatic_number_of_drafts(ops, successor, draft) -> None:
    target = build("tiny-hybrid", "cuda", torch.bfloat16, successor=successor)
    params, prompts = SamplingParams(max_new_tokens=1200), prompts_of(3)
    done = FusedEngine(target, "ngram", 3, ops()).generate(prompts, params)
    assert_follows(prompts, done, successor, 1200)
    # once around the cycle of tokens, everything has been there before
    assert done.stats.acceptance_per_token > 0.9
    automatic = FusedEngine(target, draft, "auto", ops())
    for _ in range(2):
        assert_follows(prompts, automatic.generate(prompts, params), successor, 1200)


def test_eos_ends_rows_while_steps_are_under_way(ops, successor, draft) -> None:
    target = build("tiny-mamba2", "cuda", torch.bfloat16, successor=successor)
    prompts = prompts_of(4, seed=7)
    expected = []
    for prompt in prompts:
        row = [int(successor[prompt[-1]])]
        while len(row) < 200 and row[-1] not in (100, 200, 300):
            row.append(int(successor[row[-1]]))
        expected.append(row)
    assert len({len(row) for row in expected}) > 1
    params = SamplingParams(max_new_tokens=200, eos_token_ids=(300, 100, 200))
    for k in (0, 3):
        done = FusedEngine(target, draft if k else None, k, ops()).generate(prompts, params)
        assert done.tokens == expected
        ends = ["eos" if row[-1] in params.eos_token_ids else "length" for row in expected]
        assert done.finish == ends


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("other", ["mamba1", "mamba2_window", "mamba2_mixed"])
def test_exact_speculation_equals_plain_decoding(ops, make_hybrid, kind, other) -> None:
    require_exact(ops, *close_pair(make_hybrid, other, kind))


@pytest.mark.parametrize("mixers", [["mamba2_window", "attention"], ["mamba2_window"] * 2])
def test_windows_of_attention_give_the_reference_engines_tokens(ops, make_hybrid, mixers) -> None:
    """In fp32, greedy, far beyond the window; some logits of 5 x 300 may be that close."""
    settings = {"rotary": True} if "attention" not in mixers else {}
    sizes = Mamba2Settings(4, 16, 16, 2, 2, 4, norm_groups=4, proj_bias=True, **settings)
    target = make_hybrid(mixers, seed=5, mamba2=sizes).to("cuda")
    g = torch.Generator().manual_seed(4)
    prompts = [torch.randint(3, 97, (n,), generator=g).tolist() for n in (1, 6, 7, 40, 200)]
    params = SamplingParams(max_new_tokens=300)
    plain = Engine(target).generate(prompts, params).tokens
    for k in (0, 3):
        engine = FusedEngine(target, "ngram" if k else None, k, ops())
        done = engine.generate(prompts, params).tokens
        assert sum(a == b for a, b in zip(done, plain, strict=True)) >= 4


def test_sampled_tokens_are_those_of_the_plain_engine(ops, make_hybrid) -> None:
    """In fp32. Sums run in another order, so a number next to a border may fall on the other side:
    one row of sixteen may differ.
    """
    target = make_hybrid(["mamba2", "attention", "mamba1"], seed=3).to("cuda")
    g = torch.Generator().manual_seed(3)
    prompts = [torch.randint(3, 97, (n,), generator=g).tolist() for n in range(1, 17)]
    params = SamplingParams(temperature=6.0, top_k=40, top_p=0.9, max_new_tokens=24)
    plain = Engine(target).generate(prompts, params).tokens
    engine = FusedEngine(target, None, 0, ops())
    for _ in range(2):
        done = engine.generate(prompts, params)
        assert sum(a != b for a, b in zip(done.tokens, plain, strict=True)) <= 1
    draft = make_hybrid(["mamba2"], seed=4).to("cuda")
    for drafting in (draft, "ngram"):
        done = FusedEngine(target, drafting, 2, ops()).generate(prompts, params)
        assert all(0 <= token < 97 for row in done.tokens for token in row)
        assert [len(row) for row in done.tokens] == [24] * 16


def test_a_run_of_20000_tokens_takes_no_more_memory_and_stays_finite(ops, successor, draft) -> None:
    target = build("tiny-mamba", "cuda", torch.bfloat16, successor=successor)
    engine, prompt, held, count = FusedEngine(target, draft, 3, ops()), [[5, 6, 7]], set(), 0

    def listen(row: int, new: list[int]) -> None:
        nonlocal count
        count += len(new)
        if count > 2000:
            held.add(torch.cuda.memory_allocated())

    done = engine.generate(prompt, SamplingParams(max_new_tokens=20_000), on_tokens=listen)
    assert_follows(prompt, done, successor, 20_000)
    assert len(held) == 1
    session = engine.sessions[1]
    for layer in [*session.target.layers, *session.draft.layers]:
        if isinstance(layer, RecurrentState):
            assert bool(layer.state.isfinite().all())
