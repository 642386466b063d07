"""The engine on a GPU with weights of 8 bits: scripted models, and exact speculation."""

from copy import deepcopy

import pytest
import torch
from decode.exact_speculation import close_pair, require_exact

from mambactl.decode.engine import Engine
from mambactl.decode.gpu.fused_engine import FusedEngine
from mambactl.decode.sampler import SamplingParams
from mambactl.models.byte_weights import for_decoding, round_to_bytes
from mambactl.speed.shapes import build, disagreeing, first_wrong, successors

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

V = 512


@pytest.fixture(scope="module", params=["fp8", "int8"])
def kind(request) -> str:
    return request.param


@pytest.mark.parametrize("k", [0, 3])
@pytest.mark.parametrize(
    "name", ["tiny-hybrid", "tiny-mamba", "tiny-mamba2", "tiny-window", "tiny-heads", "tiny-rotary"]
)
def test_every_token_of_a_long_run_is_right(ops, kind, name, k) -> None:
    """One row, four, and 32 whose passes are beyond the products of few rows."""
    successor = successors(V, seed=1)
    wrong = disagreeing(successor, 0.3, seed=2)
    target = build(name, "cuda", torch.bfloat16, successor=successor)
    draft = build("tiny-draft", "cuda", torch.bfloat16, seed=9, successor=wrong)
    for model in (target, draft):
        for_decoding(model, kind)
    engine = FusedEngine(target, draft if k else None, k, ops())
    g = torch.Generator().manual_seed(0)
    for batch in (1, 4, 32):
        prompts = [torch.randint(3, V, (n % 40 + 1,), generator=g).tolist() for n in range(batch)]
        done = engine.generate(prompts, SamplingParams(max_new_tokens=600))
        for prompt, tokens in zip(prompts, done.tokens, strict=True):
            assert len(tokens) == 600
            assert first_wrong([prompt[-1], *tokens], successor) is None


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("other", ["mamba1", "mamba2_window", "mamba2_mixed"])
def test_exact_speculation_equals_plain_decoding(ops, make_hybrid, kind, weights, other) -> None:
    target, close = close_pair(make_hybrid, other, weights)
    for model in (target, close):
        for_decoding(model.requires_grad_(False), kind)
    require_exact(ops, target, close)


def test_tokens_are_those_of_rounded_weights(ops, make_hybrid, kind) -> None:
    """In fp32, greedy; some logits of 5 x 200 may lie as close as sums in another order do."""
    target = make_hybrid(["mamba2", "attention", "mamba1"], seed=5).to("cuda").requires_grad_(False)
    rounded = deepcopy(target)
    round_to_bytes(rounded, kind)
    for_decoding(target, kind)
    g = torch.Generator().manual_seed(4)
    prompts = [torch.randint(3, 97, (n,), generator=g).tolist() for n in (1, 6, 7, 40, 200)]
    params = SamplingParams(max_new_tokens=200)
    plain = Engine(rounded).generate(prompts, params).tokens
    done = FusedEngine(target, None, 0, ops()).generate(prompts, params).tokens
    assert sum(one == other for one, other in zip(done, plain, strict=True)) >= 4
