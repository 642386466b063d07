"""Exact speculation on a GPU, with models whose logits may lie as close as they like."""

from collections.abc import Callable

import torch

from mambactl.decode.gpu.fused_engine import FusedEngine
from mambactl.decode.sampler import SamplingParams
from mambactl.kernels.decode.operations import DecodeOps
from mambactl.models.hybrid import HybridForCausalLM

Pair = tuple[HybridForCausalLM, HybridForCausalLM]


def close_pair(
    make_hybrid: Callable[..., HybridForCausalLM], other: str, kind: torch.dtype
) -> Pair:
    """A model with a layer of `other`, and a draft whose weights differ a little."""
    mixers = ["mamba2", "attention", other]
    target, close = (make_hybrid(mixers, seed=3).to("cuda", kind) for _ in range(2))
    g = torch.Generator("cuda").manual_seed(1)
    with torch.no_grad():
        for parameter in close.parameters():
            noise = torch.randn(parameter.shape, generator=g, device="cuda")
            parameter.add_((0.02 * noise).to(parameter.dtype))
    return target, close


def require_exact(
    ops: Callable[..., DecodeOps], target: HybridForCausalLM, draft: HybridForCausalLM
) -> None:
    """Assert that drafts change no token, while some are taken and others are not."""
    g = torch.Generator().manual_seed(2)
    prompts = [torch.randint(3, 97, (n,), generator=g).tolist() for n in (5, 1, 33, 2)]
    params = SamplingParams(max_new_tokens=600)
    plain = FusedEngine(target, None, 0, ops(exact=True)).generate(prompts, params)
    for k in (1, 3):
        done = FusedEngine(target, draft, k, ops(exact=True)).generate(prompts, params)
        assert done.tokens == plain.tokens
        assert done.stats.rejections > 50 and done.stats.accepted > 50
