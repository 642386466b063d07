"""torch.compile by region: a block is compiled once per kind and reused by every layer of it.

Lengths are fixed: every other number of columns in a batch is compiled anew, so rows must not be
trimmed. Also compiled apart are a block with and without gradients, and a batch whose rows hold
several documents and one whose rows hold one.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch

from mambactl.kernels.dispatch import answer_while_tracing, triton_missing
from mambactl.models.hybrid import HybridForCausalLM

# kinds of blocks, times what they are compiled apart for
VERSIONS = 64


def compiles(setting: bool | Literal["auto"], device: torch.device) -> bool:
    """True if blocks are compiled; auto means where kernels can be built: on CUDA with Triton."""
    if setting == "auto":
        return triton_missing(device) is None
    return setting


def compile_blocks(model: HybridForCausalLM, **options: Any) -> None:
    """Compile every block of a model in place; `options` are those of `torch.compile`.

    A checkpoint of activations stays around the compiled part.
    """
    for block in model.model.layers:
        block.run = compiled(block.run, **options)
        block.observe = compiled(block.observe, **options)


def release_blocks(model: HybridForCausalLM) -> None:
    """Undo `compile_blocks` for every block."""
    for block in model.model.layers:
        for name in ("run", "observe"):
            vars(block).pop(name, None)


def compiled(function: Callable, **options: Any) -> Callable:
    """`function` compiled as one graph without a break, for fixed shapes."""
    answer_while_tracing()
    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, VERSIONS)
    return torch.compile(function, fullgraph=True, dynamic=False, **options)
