"""Verification of drafted tokens, and the token after them; batched, per row, no model needed.

Greedy: the longest prefix equal to the target's argmaxes. Sampled: Leviathan, Kalman and Matias,
"Fast inference from transformers via speculative decoding" (arXiv 2211.17192), Algorithm 1, which
leaves the target's distribution unchanged for any draft.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mambactl.decode.sampler import draw


@dataclass(frozen=True)
class Proposal:
    """Drafted tokens of a batch; row b uses its first `lengths[b]`.

    `probs` is the distribution each token was drawn from; None means the draft was certain
    (a point mass on its own token).
    """

    tokens: Tensor  # [B, K]
    lengths: Tensor  # [B]
    probs: Tensor | None = None  # [B, K, V]


@dataclass(frozen=True)
class Verdict:
    """Per row: how many drafted tokens stay, and the token after them."""

    accepted: Tensor  # [B]
    following: Tensor  # [B]


def accept_greedy(logits: Tensor, proposal: Proposal) -> Verdict:
    """Keep drafted tokens while they equal the target's argmax; logits are [B, K + 1, V]."""
    best = logits.argmax(-1)  # [B, K + 1]
    accepted = _leading(proposal.tokens == best[:, :-1], proposal.lengths)
    return Verdict(accepted, best.gather(1, accepted[:, None]).squeeze(1))


def accept_sampled(
    probs: Tensor, proposal: Proposal, accept_uniforms: Tensor, emit_uniforms: Tensor
) -> Verdict:
    """Rejection sampling against the target's distribution.

    probs [B, K + 1, V] is the target's, filtered as the draft's was; `accept_uniforms` [B, K] and
    `emit_uniforms` [B, K + 1] (one per position where the following token may land) lie in [0, 1).
    """
    drafted = proposal.tokens[..., None]  # [B, K, 1]
    target = probs[:, :-1].gather(-1, drafted).squeeze(-1)  # [B, K]
    draft = 1.0
    if proposal.probs is not None:
        draft = proposal.probs.gather(-1, drafted).squeeze(-1)  # [B, K]
    # strict, so that a token of target probability zero never passes, not even with u = 0
    accepted = _leading(accept_uniforms * draft < target, proposal.lengths)  # [B]
    rest = residual(probs, proposal, accepted)  # [B, V]
    following = draw(rest, emit_uniforms.gather(1, accepted[:, None]).squeeze(1))
    return Verdict(accepted, following)


def residual(probs: Tensor, proposal: Proposal, accepted: Tensor) -> Tensor:
    """Distribution of the token after the accepted ones, [B, V], not normalised.

    max(p - q, 0) after a rejection; p itself when every drafted token was accepted, or when the
    difference underflows.
    """
    target = _pick(probs, accepted)  # [B, V]
    width = proposal.tokens.shape[1]
    if width == 0:
        return target
    rejected = (accepted < proposal.lengths)[:, None]  # [B, 1]
    index = accepted.clamp(max=width - 1)  # [B]
    if proposal.probs is None:
        token = proposal.tokens.gather(1, index[:, None])  # [B, 1]
        rest = target.scatter(1, token, 0.0)  # [B, V]
    else:
        rest = (target - _pick(proposal.probs, index)).clamp(min=0)  # [B, V]
    usable = rejected & (rest.sum(-1, keepdim=True) > 0)
    return torch.where(usable, rest, target)


def _leading(matches: Tensor, lengths: Tensor) -> Tensor:
    """Count the leading true values of each row, at most lengths; [B, K], [B] -> [B]."""
    inside = torch.arange(matches.shape[1], device=matches.device) < lengths[:, None]  # [B, K]
    return (matches & inside).long().cumprod(1).sum(1)


def _pick(values: Tensor, index: Tensor) -> Tensor:
    """Take one position per row; [B, K, V], [B] -> [B, V]."""
    return values[torch.arange(values.shape[0], device=values.device), index]
