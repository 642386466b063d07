"""Proof that speculative greedy decoding wrote what plain greedy decoding writes."""

from collections.abc import Sequence
from itertools import zip_longest

import torch

from mambactl.errors import CheckError
from mambactl.models.hybrid import HybridForCausalLM

Rows = Sequence[Sequence[int]]


def first_difference(plain: Rows, speculative: Rows) -> tuple[int, int] | None:
    """Row and position of the first token that differs (or is missing), None if all agree."""
    for row, (left, right) in enumerate(zip(plain, speculative, strict=True)):
        for position, (one, other) in enumerate(zip_longest(left, right)):
            if one != other:
                return row, position
    return None


def require_equal(target: HybridForCausalLM, prompts: Rows, plain: Rows, speculative: Rows) -> None:
    """Raise CheckError at the first difference, with the gap of the target's two best logits."""
    place = first_difference(plain, speculative)
    if place is None:
        return
    row, position = place
    wanted, found = (
        rows[row][position] if position < len(rows[row]) else "the end"
        for rows in (plain, speculative)
    )
    gap = top_gap(target, [*prompts[row], *plain[row][:position]])
    raise CheckError(
        f"speculative and plain decoding differ in prompt {row} at new token {position}: "
        f"{found} instead of {wanted}; the target's two best logits are {gap:.3g} apart there",
        hint="a gap near the rounding of the dtype is a tie: try --dtype float32",
    )


@torch.no_grad()
def top_gap(target: HybridForCausalLM, tokens: Sequence[int]) -> float:
    """How far apart the two best logits after `tokens` are, computed without a cache."""
    ids = torch.tensor([list(tokens)], device=target.device)  # [1, T]
    logits = target(input_ids=ids, use_cache=False, logits_to_keep=1).logits[0, -1]  # [V]
    best, second = logits.float().topk(2).values.tolist()
    return best - second
