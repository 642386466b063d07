"""Proof that speculative greedy decoding wrote what plain greedy decoding writes."""

from collections.abc import Sequence
from copy import deepcopy
from itertools import zip_longest

import torch
from torch import Tensor

from mambactl.errors import CheckError
from mambactl.models.hybrid import HybridForCausalLM

Rows = Sequence[Sequence[int]]


def first_differences(plain: Rows, speculative: Rows) -> dict[int, int]:
    """Position of the first token that differs or is missing, by row; only rows that differ."""
    found = {}
    for row, (left, right) in enumerate(zip(plain, speculative, strict=True)):
        for position, (one, other) in enumerate(zip_longest(left, right)):
            if one != other:
                found[row] = position
                break
    return found


def require_equal(target: HybridForCausalLM, prompts: Rows, plain: Rows, speculative: Rows) -> int:
    """Raise CheckError at the first difference that rounding does not explain.

    Returns how many rows differ first where both tokens are a tie for the target: their logits no
    further below the best than rounding can move two numbers there. What follows such a position
    cannot be compared.
    """
    differences = first_differences(plain, speculative)
    for row, position in differences.items():
        wanted, found = (
            rows[row][position] if position < len(rows[row]) else None
            for rows in (plain, speculative)
        )
        logits, error = measured_logits(target, [*prompts[row], *plain[row][:position]])
        gaps = [
            float("inf") if token is None else (logits.max() - logits[token]).item()
            for token in (wanted, found)
        ]
        if max(gaps) > 2 * error:
            names = ["the end" if token is None else token for token in (found, wanted)]
            raise CheckError(
                f"speculative and plain decoding differ in prompt {row} at new token {position}: "
                f"{names[0]} instead of {names[1]}; their logits are {gaps[1]:.3g} and "
                f"{gaps[0]:.3g} below the best, and rounding moves logits there by {error:.3g}",
                hint="more than 16 rows a pass (--batch-size times K + 1) are not computed alike: "
                "try --batch-size 1, or report it",
            )
    return len(differences)


def measured_logits(target: HybridForCausalLM, tokens: Sequence[int]) -> tuple[Tensor, float]:
    """The target's logits [V] after `tokens` in float32, and how far rounding moves them.

    The second is the largest difference to the logits in the target's own precision, at least one
    step of that precision at the size of the best logit.
    """
    own = next_logits(target, tokens)
    step = torch.finfo(own.dtype).eps * abs(own.max().item())
    if own.dtype == torch.float32:
        return own, step
    exact = float32_logits(target, tokens)
    return exact, max(step, (own.float() - exact).abs().max().item())


@torch.no_grad()
def next_logits(target: HybridForCausalLM, tokens: Sequence[int]) -> Tensor:
    """The target's logits [V] after `tokens`, computed without a cache."""
    ids = torch.tensor([list(tokens)], device=target.device)  # [1, T]
    return target(input_ids=ids, use_cache=False, logits_to_keep=1).logits[0, -1]


@torch.no_grad()
def float32_logits(target: HybridForCausalLM, tokens: Sequence[int]) -> Tensor:
    """Compute `next_logits` with the weights in float32, of which one block exists at a time."""
    ids = torch.tensor([list(tokens)], device=target.device)  # [1, T]
    hidden = target.model.enter(ids)[0].float()
    context = target.model.context(hidden)
    for block in target.model.layers:
        hidden = deepcopy(block).float()(hidden, context, None)
    hidden = deepcopy(target.model.norm).float()(hidden[:, -1:])
    return deepcopy(target.lm_head).float()(hidden)[0, -1]
