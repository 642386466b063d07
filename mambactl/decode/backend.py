"""Chooses the engine: the GPU's kernels where they run, the PyTorch reference everywhere else."""

from collections.abc import Sequence
from functools import cache
from typing import Literal, Protocol

import torch

from mambactl import console
from mambactl.decode.drafters import Drafter, ModelDrafter, NgramDrafter
from mambactl.decode.engine import Engine, Generation, OnTokens
from mambactl.decode.sampler import SamplingParams
from mambactl.kernels.dispatch import triton_missing
from mambactl.models.hybrid import HybridForCausalLM

NGRAM = "ngram"
# what "auto" means where nothing is measured
REFERENCE_K = 4

Draft = HybridForCausalLM | Literal["ngram"] | None
K = int | Literal["auto"]


class AnyEngine(Protocol):
    """What decodes, on whatever device."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        on_tokens: OnTokens | None = None,
        keys: Sequence[int] | None = None,
    ) -> Generation:
        """Continue every prompt; see `decode.engine.Engine.generate`."""


def why_not(device: torch.device) -> str | None:
    """Why the GPU kernels cannot decode on a device; None if they can."""
    return triton_missing(device)


def make_engine(
    target: HybridForCausalLM, draft: Draft, k: K, exact: bool = False, share: bool = True
) -> AnyEngine:
    """An engine for `target` with `draft` (a model, "ngram" or None, which needs k = 0).

    `exact`: passes of few rows compute every row the same way however many rows there are, so that
    speculative and plain decoding agree bit for bit. `share`: what prompts, also of several calls,
    begin with together is read once; without it every call does the same work. Whether both
    models mean the same tokens is the caller's to check: their vocabularies may differ by padding.
    """
    reason = why_not(target.device)
    if reason is None:
        from mambactl.decode.gpu.fused_engine import FusedEngine
        from mambactl.kernels.decode.triton.ops import TritonOps
        from mambactl.models.packed import NotSupported

        try:
            return FusedEngine(target, draft, k, TritonOps.for_model(target, exact), share)
        except NotSupported as error:
            reason = f"they do not support {error}"
    if target.device.type == "cuda":
        _say_once(f"GPU decode kernels are off ({reason}); the PyTorch reference decodes")
    return Engine(target, _drafter(draft, target), REFERENCE_K if k == "auto" else k, share)


@cache
def _say_once(message: str) -> None:
    console.warn(message)


def _drafter(draft: Draft, target: HybridForCausalLM) -> Drafter | None:
    if draft is None or draft == NGRAM:
        return None if draft is None else NgramDrafter()
    return ModelDrafter(draft, target.config.vocab_size)
