"""The engine of whole steps with the reference kernels, the plain engine, and prompts for both."""

import torch

from mambactl.decode.drafters import ModelDrafter, NgramDrafter
from mambactl.decode.engine import Engine
from mambactl.decode.gpu.fused_engine import FusedEngine
from mambactl.decode.sampler import SamplingParams
from mambactl.kernels.decode.reference.ops import ReferenceOps
from mambactl.models.key_ring import WindowSettings
from mambactl.models.mixers.mamba1 import Mamba1Settings
from mambactl.models.mixers.mamba2_decode import Mamba2Settings

NATIVE1 = Mamba1Settings(d_inner=40, dt_rank=3, d_state=6, native=True)
NATIVE2 = Mamba2Settings(4, 8, 12, x_heads=4, b_groups=1, c_groups=1, norm_groups=1)
ROTARY = Mamba2Settings(4, 8, 16, x_heads=2, b_groups=2, c_groups=4, norm_groups=4, rotary=True)
SPAN = WindowSettings(window=6, sinks=2)
GREEDY = SamplingParams(max_new_tokens=14)


def fused(target, draft=None, k=0) -> FusedEngine:
    return FusedEngine(target, draft, k, ReferenceOps())


def plain(target, draft=None, k=0) -> Engine:
    if draft == "ngram":
        return Engine(target, NgramDrafter(), k)
    return Engine(target, draft and ModelDrafter(draft, target.config.vocab_size), k)


def prompts_of(lengths: list[int], seed: int = 0) -> list[list[int]]:
    """Random prompts that repeat themselves, so that n-grams find something to copy."""
    g = torch.Generator().manual_seed(seed)
    cycle = [torch.randint(3, 97, (12,), generator=g).tolist() for _ in lengths]
    return [(tokens * (n // 12 + 1))[:n] for tokens, n in zip(cycle, lengths, strict=True)]
