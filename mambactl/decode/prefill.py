"""Reading prompts of different lengths into a cache."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mambactl.models.cache import HybridCache
from mambactl.models.hybrid import HybridForCausalLM

# bounds the memory of a long prompt; a chunk continues from the cache of the one before
PREFILL_CHUNK = 2048


def prefill(
    model: HybridForCausalLM, prompts: Sequence[Sequence[int]], recording: bool
) -> tuple[HybridCache, Tensor]:
    """Run every prompt (possibly empty) through the model.

    Returns the cache, which may be rolled back to any later point than the prompts' ends when
    `recording`, and the hidden states [B, D] of the last tokens, 0 for empty prompts.
    """
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=model.device)  # [B]
    cache = HybridCache(model.config, len(prompts), model.device)
    # one column even for empty prompts, so that the cache leaves its initial state
    tokens = pad(prompts, model.device, least=1)  # [B, T]
    last = model.lm_head.weight.new_zeros(len(prompts), model.config.hidden_size)
    for start in range(0, tokens.shape[1], PREFILL_CHUNK):
        chunk = tokens[:, start : start + PREFILL_CHUNK]  # [B, <= PREFILL_CHUNK]
        n_new = (lengths - start).clamp(0, PREFILL_CHUNK)
        hidden = model.model(
            input_ids=chunk, past_key_values=cache, n_new=n_new, use_cache=True
        ).last_hidden_state  # [B, <= PREFILL_CHUNK, D]
        last = newest(hidden, n_new, last)
    # what was read without recording is permanent
    cache.recording = recording
    return cache, last


def newest(hidden: Tensor, n_new: Tensor, last: Tensor) -> Tensor:
    """The last of the first n_new [B] rows of hidden [B, T, D], and `last` [B, D] without any."""
    index = (n_new - 1).clamp(min=0)[:, None, None].expand(-1, 1, hidden.shape[2])
    return torch.where(n_new[:, None] > 0, hidden.gather(1, index)[:, 0], last)


def pad(rows: Sequence[Sequence[int]], device: torch.device | str, least: int = 0) -> Tensor:
    """Pad token lists with zeros on the right, [B, longest or `least`]."""
    width = max([least, *map(len, rows)])
    padded = [[*row, *[0] * (width - len(row))] for row in rows]
    return torch.tensor(padded, dtype=torch.long, device=device).view(len(rows), width)
