"""Proof that speculative greedy decoding wrote what plain greedy decoding writes."""

from collections.abc import Sequence
from itertools import zip_longest

import torch

from mambactl.errors import CheckError
from mambactl.models.hybrid import HybridForCausalLM

Rows = Sequence[Sequence[int]]


def first_differences(plain: Rows, speculative: Rows) -> dict[int, int]:
    """Row -> position of its first token that differs or is missing; only rows that differ."""
    found = {}
    for row, (left, right) in enumerate(zip(plain, speculative, strict=True)):
        for position, (one, other) in enumerate(zip_longest(left, right)):
            if one != other:
                found[row] = position
                break
    return found


def require_equal(target: HybridForCausalLM, prompts: Rows, plain: Rows, speculative: Rows) -> int:
    """Raise CheckError at the first difference that rounding does not explain.

    Returns how many rows differ first where the target's two best logits are a tie: no further
    apart than both can move by one step of its precision. What follows cannot be compared.
    """
    differences = first_differences(plain, speculative)
    for row, position in differences.items():
        wanted, found = (
            rows[row][position] if position < len(rows[row]) else "the end"
            for rows in (plain, speculative)
        )
        gap, step = top_gap(target, [*prompts[row], *plain[row][:position]])
        if gap > 2 * step:
            raise CheckError(
                f"speculative and plain decoding differ in prompt {row} at new token {position}: "
                f"{found} instead of {wanted}; the target's two best logits are {gap:.3g} apart "
                f"there, and a step of its precision is {step:.3g}",
                hint="please report it; --draft ngram or another -k may avoid it",
            )
    return len(differences)


@torch.no_grad()
def top_gap(target: HybridForCausalLM, tokens: Sequence[int]) -> tuple[float, float]:
    """How far apart the two best logits after `tokens` are, computed without a cache, and the
    distance between neighbouring numbers of the model's precision at that size.
    """
    ids = torch.tensor([list(tokens)], device=target.device)  # [1, T]
    logits = target(input_ids=ids, use_cache=False, logits_to_keep=1).logits[0, -1]  # [V]
    best, second = logits.float().topk(2).values.tolist()
    # half-precision spacing is relative to the power of two below, at most eps * |best|
    return best - second, torch.finfo(logits.dtype).eps * abs(best)
