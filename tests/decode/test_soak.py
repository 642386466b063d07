"""A long run of a model with mixed layers on a GPU, with and without drafts: `-m soak` only."""

from collections.abc import Callable

import pytest
import torch
from decode.engines import noisy, prompts_of
from decode.memory import assert_same_memory, poisoned

from mambactl.decode.equality import first_differences
from mambactl.decode.gpu.fused_engine import FusedEngine
from mambactl.decode.sampler import SamplingParams
from mambactl.kernels.decode.operations import DecodeOps
from mambactl.models.hybrid import HybridForCausalLM
from mambactl.models.packed import RecurrentState

pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

MIXERS = ["mamba2_mixed", "mamba2_window", "mamba2_mixed"]
TOKENS, K = 20_000, 3
LENGTHS = [37, 5]


class Listener:
    """Reads how many bytes are allocated once `after` tokens are written."""

    def __init__(self, after: int, allocated: Callable[[], int]) -> None:
        self.after, self.allocated = after, allocated
        self.count, self.sizes = 0, set()

    def __call__(self, row: int, new: list[int]) -> None:
        self.count += len(new)
        if self.count > self.after:
            self.sizes.add(self.allocated())


def soak(
    target: HybridForCausalLM,
    draft: HybridForCausalLM,
    ops: DecodeOps,
    tokens: int,
    allocated: Callable[[], int],
) -> None:
    """Decode plainly and with drafts: the same tokens and memory, and none of it grows.

    `allocated()` says how many bytes are; it is asked from a tenth of the tokens on.
    """
    rows = len(LENGTHS)
    prompts, params = prompts_of(LENGTHS, seed=4), SamplingParams(max_new_tokens=tokens)
    engines = FusedEngine(target, None, 0, ops), FusedEngine(target, draft, K, ops)
    written, sessions = [], []
    for engine in engines:
        listener = Listener(rows * tokens // 10, allocated)
        done = engine.generate(prompts, params, on_tokens=listener)
        written.append(done.tokens)
        assert [len(row) for row in done.tokens] == [tokens] * rows
        assert len(listener.sizes) == 1
        (session,) = engine.sessions.values()
        for layer in session.target.layers:
            assert isinstance(layer, RecurrentState) and layer.state[:rows].isfinite().all()
        sessions.append(session)
    assert first_differences(*written) == {}
    assert done.stats.rejections > tokens // 100 < done.stats.accepted
    for row, length in enumerate(LENGTHS):
        assert_same_memory(*sessions, row, length - 1)


def test_20000_tokens_with_and_without_drafts(ops, make_hybrid, monkeypatch) -> None:
    target, draft = (make_hybrid(MIXERS, seed=3).to("cuda", torch.bfloat16) for _ in range(2))
    with poisoned(monkeypatch):
        soak(target, noisy(draft, 0.02), ops(exact=True), TOKENS, torch.cuda.memory_allocated)
