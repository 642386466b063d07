"""Layers of kept heads, windows and states on a GPU: speculation against plain decoding."""

import pytest
import torch
from decode.engines import noisy
from decode.memory import assert_exact, poisoned

from mambactl.decode.equality import require_equal
from mambactl.decode.gpu.fused_engine import FusedEngine
from mambactl.decode.sampler import SamplingParams
from mambactl.models.key_ring import WindowSettings

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

MIXERS = ["mamba2_mixed", "mamba2_window", "mamba2_mixed", "attention"]
# rings of windows of this size have room for few drafts before they need another 16 slots
SPAN = WindowSettings(window=14, sinks=3)


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def pair(request, make_hybrid):
    """A target, and a draft that agrees with it some of the time."""
    target, close = (
        make_hybrid(MIXERS, seed=3, mamba2_window=SPAN).to("cuda", request.param) for _ in range(2)
    )
    return target, noisy(close, 0.02)


def prompts_of(batch: int) -> list[list[int]]:
    """Prompts of 1 to 40 random tokens, the longest first."""
    g = torch.Generator().manual_seed(2)
    lengths = [40, 1, *torch.randint(2, 41, (batch,), generator=g).tolist()][:batch]
    return [torch.randint(3, 97, (n,), generator=g).tolist() for n in lengths]


@pytest.mark.parametrize(("batch", "k"), [(1, 3), (1, 15), (2, 7), (4, 3)])
def test_passes_of_up_to_16_rows_leave_the_memory_of_plain_decoding(
    ops, monkeypatch, pair, batch, k
) -> None:
    """Tokens, states, projections, and keys and values of kept heads and windows, bit for bit, in
    memory that holds NaN and has more of it on both sides.
    """
    target, close = pair
    with poisoned(monkeypatch):
        engine = FusedEngine(target, close, k, ops(exact=True))
        plainly = FusedEngine(target, None, 0, ops(exact=True))
        done = assert_exact(engine, plainly, prompts_of(batch), SamplingParams(max_new_tokens=300))
    assert done.stats.rejections > 5 and done.stats.accepted > 5


@pytest.mark.parametrize(("batch", "k"), [(8, 4), (32, 3)])
def test_more_rows_differ_at_ties_alone(ops, monkeypatch, pair, batch, k) -> None:
    target, close = pair
    prompts, params = prompts_of(batch), SamplingParams(max_new_tokens=100)
    with poisoned(monkeypatch):
        plain = FusedEngine(target, None, 0, ops(exact=True)).generate(prompts, params)
        done = FusedEngine(target, close, k, ops(exact=True)).generate(prompts, params)
    ties = require_equal(target, prompts, plain.tokens, done.tokens)
    if target.dtype == torch.float32:
        assert ties <= 1
    assert done.stats.rejections > 50 and done.stats.accepted > 50
