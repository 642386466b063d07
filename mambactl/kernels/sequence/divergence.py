"""Losses and gradient of rows of logits, one program per row; see `kernels.divergence`.

A row is far larger than a program's registers, so it is read more than once: for the log of the
sum of exponentials (online, Milakov and Gimelshein 2018, arXiv 1805.02867, one running maximum per
lane and no barrier in the loop), for a mean that the gradients of reverse KL and JSD need, and for
the gradient. Rows of weight zero are not read at all.
"""

import math

import triton
import triton.language as tl
from torch import Tensor

from mambactl.kernels.divergence import Samples, Terms
from mambactl.kernels.launch import launch_options, rounded

BLOCK = 4096
WARPS = 16
# ascending in what they read and compute: a second row from FORWARD on, a mean from REVERSE on
NONE = tl.constexpr(0)
SAMPLED = tl.constexpr(1)
FORWARD = tl.constexpr(2)
REVERSE = tl.constexpr(3)
JSD = tl.constexpr(4)
_KINDS = {"forward": FORWARD, "reverse": REVERSE, "jsd": JSD}
# below every logit, and finite: a lane that saw none has no NaN
LOWEST = tl.constexpr(-1e30)


@triton.jit
def _log_sum(row, V, rate, BLOCK: tl.constexpr):
    """Log of the sum of exp(rate * row)."""
    lane = tl.arange(0, BLOCK)
    top = tl.full([BLOCK], LOWEST, tl.float32)
    mass = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        x = tl.load(row + start + lane, mask=start + lane < V, other=float("-inf"))
        x = x.to(tl.float32) * rate
        higher = tl.maximum(top, x)
        mass = mass * tl.exp(top - higher) + tl.exp(x - higher)
        top = higher
    peak = tl.max(top, 0)
    return peak + tl.log(tl.sum(mass * tl.exp(top - peak), 0))


@triton.jit
def _log_probs(row, tokens, V, rate, log_sum):
    """Log-probabilities of tokens [BLOCK], -inf beyond the vocabulary."""
    x = tl.load(row + tokens, mask=tokens < V, other=float("-inf"))
    return x.to(tl.float32) * rate - log_sum


@triton.jit
def _term(probs, values):
    """probs * values, zero where there is no probability."""
    return tl.where(probs > 0, probs * values, 0.0)


@triton.jit
def _log_mixture(log_p, log_q, log_beta, log_rest):
    """Log of beta q + (1 - beta) p."""
    a, b = log_q + log_beta, log_p + log_rest
    high = tl.maximum(a, b)
    return high + tl.log(1.0 + tl.exp(tl.minimum(a, b) - high))


@triton.jit
def _expectations(
    z, t, V, rate, sum_p, sum_q, beta, log_beta, log_rest,
    KIND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The divergence (REVERSE, JSD), and the student's mean that its gradient subtracts."""
    lane = tl.arange(0, BLOCK)
    own = tl.zeros([BLOCK], tl.float32)
    other = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        log_p = _log_probs(z, start + lane, V, rate, sum_p)
        log_q = _log_probs(t, start + lane, V, rate, sum_q)
        p, q = tl.exp(log_p), tl.exp(log_q)
        if KIND == REVERSE:
            own += _term(p, log_p - log_q)
            # sums to zero; it cancels the rounding of both log-sums in `value`
            other += q - p
        else:
            log_m = _log_mixture(log_p, log_q, log_beta, log_rest)
            own += _term(p, log_p - log_m)
            other += _term(q, log_q - log_m)
    mean = tl.sum(own, 0)
    if KIND == REVERSE:
        return mean + tl.sum(other, 0), mean
    return beta * tl.sum(other, 0) + (1.0 - beta) * mean, mean


@triton.jit
def _drawn(ids, masses, K, tokens, BLOCK: tl.constexpr):
    """The weights of drawn ids, added up at tokens [BLOCK]."""
    q = tl.zeros([BLOCK], tl.float32)
    for k in range(0, K):
        q += tl.where(tokens == tl.load(ids + k).to(tl.int32), tl.load(masses + k), 0.0)
    return q


@triton.jit
def _row_kernel(
    logits, guide, ids, masses, targets, weights, grad, divergence, ce, V, K,
    logits_stride, guide_stride, grad_stride, rate, square, match, ce_weight, scale,
    beta, log_beta, log_rest,
    KIND: tl.constexpr, SOFT: tl.constexpr, GRAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    number = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    z, slope = logits + number * logits_stride, grad + number * grad_stride
    weight = tl.load(weights + number)
    if weight == 0.0:
        tl.store(divergence + number, 0.0)
        tl.store(ce + number, 0.0)
        if GRAD:
            for start in range(0, V, BLOCK):
                nothing = tl.zeros([BLOCK], grad.dtype.element_ty)
                tl.store(slope + start + lane, nothing, mask=start + lane < V)
    else:
        t = guide + number * guide_stride
        ids += number * K
        masses += number * K
        target = tl.load(targets + number).to(tl.int32)
        sum_1 = _log_sum(z, V, 1.0, BLOCK)
        sum_p = _log_sum(z, V, rate, BLOCK) if SOFT else sum_1
        sum_q, mean, value, total = 0.0, 0.0, 0.0, 0.0
        if KIND >= FORWARD:
            sum_q = _log_sum(t, V, rate, BLOCK)
        if KIND >= REVERSE:
            value, mean = _expectations(
                z, t, V, rate, sum_p, sum_q, beta, log_beta, log_rest, KIND, BLOCK
            )
        if KIND == SAMPLED:
            for k in range(0, K):
                total += tl.load(masses + k)
        values = tl.zeros([BLOCK], tl.float32)
        at_target = tl.zeros([BLOCK], tl.float32)
        for start in range(0, V, BLOCK):
            tokens = start + lane
            log_p = _log_probs(z, tokens, V, 1.0, sum_1)
            hit = tokens == target
            at_target += tl.where(hit, log_p, 0.0)
            change = ce_weight * (tl.exp(log_p) - hit.to(tl.float32))
            if KIND != NONE:
                if SOFT:
                    log_p = (log_p + sum_1) * rate - sum_p
                p = tl.exp(log_p)
                if KIND == SAMPLED:
                    q = _drawn(ids, masses, K, tokens, BLOCK)
                    values -= tl.where(q != 0.0, q * log_p, 0.0)
                    change += match * (total * p - q)
                else:
                    log_q = _log_probs(t, tokens, V, rate, sum_q)
                    if KIND == FORWARD:
                        q = tl.exp(log_q)
                        # p - q sums to zero; see `_expectations`
                        values += _term(q, log_q - log_p) + (p - q)
                        change += match * (p - q)
                    elif KIND == REVERSE:
                        change += match * _term(p, log_p - log_q - mean)
                    else:
                        log_m = _log_mixture(log_p, log_q, log_beta, log_rest)
                        change += match * (1.0 - beta) * _term(p, log_p - log_m - mean)
            if GRAD:
                change = rounded(change * (weight * scale), grad.dtype.element_ty)
                tl.store(slope + tokens, change, mask=tokens < V)
        value += tl.sum(values, 0)
        tl.store(divergence + number, value * square * weight)
        tl.store(ce + number, -tl.sum(at_target, 0) * weight)


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
    """See `kernels.divergence.token_losses`; rows may have any stride, logits are not fp64."""
    rows, size = logits.shape
    ids = masses = dense = None
    kind = NONE
    if isinstance(guide, Samples):
        (ids, masses), kind = (part.contiguous() for part in guide), SAMPLED
    elif guide is not None:
        dense, kind = guide, _KINDS[terms.divergence]
    # what a kind does not read may be anything
    _row_kernel[(rows,)](
        logits,
        logits if dense is None else dense,
        targets if ids is None else ids,
        weights if masses is None else masses,
        targets,
        weights,
        logits if grad is None else grad,
        divergence,
        ce,
        size,
        0 if ids is None else ids.shape[1],
        logits.stride(0),
        0 if dense is None else dense.stride(0),
        0 if grad is None else grad.stride(0),
        1 / terms.temperature,
        terms.temperature**2,
        terms.match * terms.temperature,
        terms.ce,
        terms.scale,
        terms.beta,
        math.log(terms.beta),
        math.log1p(-terms.beta),
        KIND=kind,
        SOFT=terms.temperature != 1.0,
        GRAD=grad is not None,
        BLOCK=min(BLOCK, triton.next_power_of_2(size)),
        **launch_options(False, num_warps=WARPS),
    )
