"""Distances between two next-token distributions and their gradient, row by row of logits.

With q the teacher's softmax of logits / T and p the student's, a row's divergence is T^2 times

- forward: KL(q || p);  reverse: KL(p || q);
- jsd: b KL(q || m) + (1 - b) KL(p || m) with m = b q + (1 - b) p (GKD, arXiv 2306.13649, eq. 1);
- of samples: -sum_k w_k log p(id_k), cross entropy against drawn ids with weights w (2503.16870);

T^2 keeps gradients the size that they have at T = 1 (arXiv 1503.02531). Next to it stands the cross
entropy of one target per row, which has no temperature. This file defines what is correct;
`kernels.sequence.divergence` is the same on a GPU.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

DIVERGENCES = ("forward", "reverse", "jsd")


class Samples(NamedTuple):
    """Ids drawn from the teacher, ids [n, K] of any integer type, and their weights [n, K] fp32."""

    ids: Tensor
    masses: Tensor


class Terms(NamedTuple):
    """Terms of a loss: `match` times the divergence plus `ce` times the cross entropy.

    `scale` multiplies the gradient, so that small numbers survive in fp16.
    """

    divergence: str = "forward"
    beta: float = 0.5
    temperature: float = 1.0
    match: float = 1.0
    ce: float = 0.0
    scale: float = 1.0


def token_losses(
    logits: Tensor,
    guide: Tensor | Samples | None,
    targets: Tensor,
    weights: Tensor,
    terms: Terms,
    grad: Tensor | None,
    divergence: Tensor,
    ce: Tensor,
) -> None:
    """Losses of rows and the gradient of their sum: logits [n, V], the teacher's or samples of it.

    targets [n] int64; weights [n] fp32 multiply a row's losses and gradient. Writes divergence [n]
    (zero without a guide) and ce [n], and to grad [n, V], if given, `terms.scale` times the
    gradient of terms.match * divergence + terms.ce * ce. grad may be `logits` itself.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    x = logits.to(wide)
    log_p = x.log_softmax(-1)  # [n, V]
    ce.copy_(-log_p.gather(-1, targets[:, None])[:, 0] * weights)
    slope = None
    if grad is not None and terms.ce:
        slope = log_p.exp().mul_(terms.ce)
        slope.scatter_add_(-1, targets[:, None], slope.new_full((len(x), 1), -terms.ce))
    if guide is None:
        divergence.zero_()
    else:
        if terms.temperature != 1.0:
            log_p = (x / terms.temperature).log_softmax(-1)
        value, change = _divergence(log_p, guide, terms)
        divergence.copy_(value * terms.temperature**2 * weights)
        # d (T^2 f(logits / T)) / d logits
        change.mul_(terms.match * terms.temperature)
        slope = change if slope is None else slope.add_(change)
    if grad is not None:
        if slope is None:
            grad.zero_()
        else:
            grad.copy_(slope.mul_(weights.to(wide)[:, None] * terms.scale))


def _divergence(log_p: Tensor, guide: Tensor | Samples, terms: Terms) -> tuple[Tensor, Tensor]:
    """Value [n] and gradient [n, V] with respect to logits / T."""
    p = log_p.exp()  # [n, V]
    if isinstance(guide, Samples):
        ids, masses = guide.ids.long(), guide.masses.to(p.dtype)
        value = -(masses * log_p.gather(-1, ids)).sum(-1)
        return value, (p * masses.sum(-1, keepdim=True)).scatter_add_(-1, ids, -masses)
    log_q = (guide.to(p.dtype) / terms.temperature).log_softmax(-1)  # [n, V]
    q = log_q.exp()
    if terms.divergence == "forward":
        return _mean(q, log_q - log_p), p - q
    if terms.divergence == "reverse":
        ratio = log_p - log_q
        value = _mean(p, ratio)
        return value, p * (ratio - value[:, None])
    beta = terms.beta
    log_m = torch.logaddexp(log_q + math.log(beta), log_p + math.log1p(-beta))  # [n, V]
    ratio = log_p - log_m
    from_student = _mean(p, ratio)
    value = beta * _mean(q, log_q - log_m) + (1 - beta) * from_student
    return value, (1 - beta) * p * (ratio - from_student[:, None])


def _mean(probs: Tensor, values: Tensor) -> Tensor:
    """Expectation per row; what has no probability does not count, even where it is infinite."""
    return (probs * values.masked_fill(probs == 0, 0.0)).sum(-1)


# of an output's variance, what rounding to bf16 may leave between two computations of it
LEAST_MISSING = 1e-4


def relative_error(
    got: Tensor, wanted: Tensor, valid: Tensor, given: Tensor | None = None
) -> Tensor:
    """Sum over valid tokens of the mean squared error over the wanted output's variance.

    got, wanted [B, T, D]; valid [B, T]; fp32 scalar. Where something else is `given` [B, T, D] of
    what is wanted, `got` is for the rest, and the variance is that of the rest (or LEAST_MISSING of
    the whole). Choosing rows instead of masking them would wait for the device to count them.
    """
    got, wanted, keep = got.float(), wanted.float(), valid[..., None]
    width = wanted.shape[-1]
    count = valid.sum() * width

    def variance_of(values: Tensor) -> Tensor:
        mean = values.masked_fill(~keep, 0).sum() / count
        return (values - mean).masked_fill(~keep, 0).square().sum() / count

    variance = variance_of(wanted)
    if given is not None:
        wanted = wanted - given.float()
        variance = torch.maximum(variance_of(wanted), LEAST_MISSING * variance)
    return (got - wanted).masked_fill(~keep, 0).square().sum() / (width * variance)
