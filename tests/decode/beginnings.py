"""Models of every form, and prompts that begin alike."""

import torch
from decode.engines import NATIVE1

from mambactl.models.mixers.settings import WindowSettings

SPAN = WindowSettings(window=9, sinks=3)
MODELS = {
    "attention": {"mixers": ["attention", "mamba2"], "sliding_window": 40},
    "recurrent": {"mixers": ["mamba1", "mamba2"]},
    "native": {"mixers": ["mamba1"] * 2, "mamba1": NATIVE1, "has_mlp": False},
    "windowed": {"mixers": ["mamba2_window", "attention"], "mamba2_window": SPAN},
    "kept heads": {"mixers": ["mamba2_mixed"] * 2, "mamba2_window": SPAN},
}
SHARED = 80


def tokens(count: int, seed: int) -> list[int]:
    return torch.randint(3, 97, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def asked(ends: list[int], seed: int = 0) -> list[list[int]]:
    """Prompts with one beginning of 80 tokens, which part in the next token."""
    start = tokens(SHARED, seed)
    return [[*start, 3 + n, *tokens(end, n)] for n, end in enumerate(ends)]
