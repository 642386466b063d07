"""Logits of a checkpoint folder, through transformers alone."""

from pathlib import Path

import torch
from torch import Tensor

# a prompt longer than a convolution, a window with its sinks and a chunk of the scan
TOKENS = 72
EVERY = 6


def prompt(vocabulary: int) -> Tensor:
    """Ids [1, TOKENS] that repeat nothing for a while; the special tokens are left out."""
    return 4 + torch.arange(TOKENS)[None] * 7 % (vocabulary - 4)


def logits_of(folder: Path) -> Tensor:
    """Logits [TOKENS / EVERY, vocabulary] of a checkpoint at every sixth token of `prompt`."""
    # the only module of the package that these tests name: it registers the class
    from transformers import AutoModelForCausalLM

    import mambactl.models.hybrid  # noqa: F401

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        found = model(prompt(model.config.vocab_size), use_cache=False).logits
    return found[0, EVERY - 1 :: EVERY].contiguous()
