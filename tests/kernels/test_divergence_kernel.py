"""Losses and gradients of rows of logits: the reference against autograd in fp64, the kernel
against the reference.

Logits are up to 25 large, where fp32 log-probabilities are known to 2e-6: gradients may be off by
ten times that, relative to the largest.
"""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from mambactl.kernels import divergence as reference
from mambactl.kernels.divergence import Samples, Terms

pytestmark = pytest.mark.one_in(3)

pytest.importorskip("triton")
kernel = pytest.importorskip("mambactl.kernels.sequence.divergence")

# (rows, vocabulary): one block with a tail, exactly one block, and more than one
SHAPES = [(3, 37), (2, 64), (2, 4096 + 130)]
TERMS = [
    Terms("forward"),
    Terms("forward", temperature=2.5, match=0.3, ce=0.7),
    Terms("reverse"),
    Terms("reverse", temperature=0.7, match=2.0, ce=1.5),
    Terms("jsd"),
    Terms("jsd", beta=0.1, temperature=1.7, match=0.5, ce=0.2),
]


def draw(rows: int, size: int, seed: int, dtype: torch.dtype = torch.float32):
    """Logits, the teacher's (close to them in every second row), targets, weights."""
    g = torch.Generator().manual_seed(seed)
    logits = 6 * torch.randn(rows, size, generator=g)
    guide = 6 * torch.randn(rows, size, generator=g)
    guide[::2] = logits[::2] + 0.1 * guide[::2]
    weights = torch.rand(rows, generator=g)
    targets = torch.randint(size, (rows,), generator=g)
    return logits.to(dtype), guide.to(dtype), targets, weights


def draw_samples(rows: int, size: int, count: int, seed: int) -> Samples:
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(size, (rows, count), generator=g, dtype=torch.int32)
    # an id that is drawn twice counts twice
    ids[:, -1] = ids[:, 0]
    return Samples(ids, torch.rand(rows, count, generator=g))


def dense(logits: Tensor, guide: Tensor | Samples | None, terms: Terms) -> Tensor:
    """The divergence of rows [n] as its definition says, T^2 included."""
    log_p = (logits / terms.temperature).log_softmax(-1)
    if isinstance(guide, Samples):
        masses = torch.zeros_like(log_p)
        for k in range(guide.ids.shape[1]):
            masses[torch.arange(len(masses)), guide.ids[:, k].long()] += guide.masses[:, k].double()
        return -(terms.temperature**2) * (masses * log_p).sum(-1)
    log_q = (guide / terms.temperature).log_softmax(-1)

    def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
        return functional.kl_div(log_b, log_a, log_target=True, reduction="none").sum(-1)

    if terms.divergence == "jsd":
        log_m = (terms.beta * log_q.exp() + (1 - terms.beta) * log_p.exp()).log()
        found = terms.beta * kl(log_q, log_m) + (1 - terms.beta) * kl(log_p, log_m)
    else:
        found = kl(log_q, log_p) if terms.divergence == "forward" else kl(log_p, log_q)
    return terms.temperature**2 * found


def run(module, logits, guide, targets, weights, terms, grad):
    found = [torch.full((len(logits),), float("nan"), device=logits.device) for _ in range(2)]
    if module is reference:
        found = [part.to(torch.promote_types(logits.dtype, torch.float32)) for part in found]
    module.token_losses(logits, guide, targets, weights, terms, grad, *found)
    return found


def put(value, device: str):
    return (
        value.to(device) if isinstance(value, Tensor) else Samples(*(t.to(device) for t in value))
    )


@pytest.mark.parametrize("terms", TERMS, ids=str)
@pytest.mark.parametrize("guided", ["dense", "sampled", "alone"])
def test_reference_is_the_definition(terms, guided):
    logits, guide, targets, weights = draw(3, 37, 0, torch.float64)
    guide = {"dense": guide, "sampled": draw_samples(3, 37, 5, 1), "alone": None}[guided]
    leaf, grad = logits.clone().requires_grad_(), torch.empty_like(logits)
    terms = terms._replace(scale=4.0)
    divergence, ce = run(reference, logits, guide, targets, weights.double(), terms, grad)
    expected = torch.zeros(3, dtype=torch.float64) if guide is None else dense(leaf, guide, terms)
    expected_ce = functional.cross_entropy(leaf, targets, reduction="none")
    (weights * (terms.match * expected + terms.ce * expected_ce)).sum().backward()
    torch.testing.assert_close(divergence, expected * weights, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(ce, expected_ce * weights, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(grad, 4 * leaf.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("terms", TERMS, ids=str)
def test_kernel_is_the_reference(terms, shape, device, assert_near):
    logits, guide, targets, weights = draw(*shape, 1)
    _compare(logits, guide, targets, weights, terms, device, assert_near)


@pytest.mark.parametrize("size", [37, 4096 + 130])
@pytest.mark.parametrize("terms", TERMS[:2], ids=str)
def test_kernel_with_samples_is_the_reference(terms, size, device, assert_near):
    logits, _, targets, weights = draw(2, size, 2)
    guide = draw_samples(2, size, 3, 3)
    _compare(logits, guide, targets, weights, terms, device, assert_near)


def test_kernel_without_a_teacher_is_cross_entropy(device, assert_near):
    logits, _, targets, weights = draw(4, 300, 4)
    _compare(logits, None, targets, weights, Terms(ce=0.7), device, assert_near)


def _compare(logits, guide, targets, weights, terms, device, assert_near):
    exact = torch.empty_like(logits, dtype=torch.float64)
    wide = guide.double() if isinstance(guide, Tensor) else guide
    losses = run(reference, logits.double(), wide, targets, weights.double(), terms, exact)
    grad = torch.full_like(logits, float("nan")).to(device)
    inputs = (put(part, device) for part in (logits, guide, targets, weights) if part is not None)
    logits, *middle, targets, weights = inputs
    found = run(kernel, logits, middle[0] if middle else None, targets, weights, terms, grad)
    assert_near(grad.cpu(), exact, 2e-5)
    # the smallest divergence is 1e-2 here; rounding of the log-sums must not show in it
    torch.testing.assert_close(found[0].cpu().double(), losses[0], rtol=2e-5, atol=1e-6)
    torch.testing.assert_close(found[1].cpu().double(), losses[1], rtol=5e-6, atol=5e-6)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_the_gradient_may_replace_the_logits(kind, device, assert_near):
    """Rows of any stride, of bf16 logits too."""
    logits, guide, targets, weights = draw(3, 4096 + 77, 5, kind)
    terms = Terms("jsd", ce=0.5)
    exact = torch.empty_like(logits, dtype=torch.float64)
    run(reference, logits.double(), guide.double(), targets, weights.double(), terms, exact)
    put = torch.empty(3, 4096 + 80, dtype=kind, device=device)[:, : 4096 + 77]
    put.copy_(logits)
    run(kernel, put, guide.to(device), targets.to(device), weights.to(device), terms, put)
    assert_near(put.cpu(), exact, 2e-5 if kind == torch.float32 else 2**-8)


def test_small_distances_are_not_lost_to_rounding(device):
    """A divergence of 1e-4 nats between logits of size 40 is right to a percent."""
    logits, _, targets, weights = draw(4, 501, 6)
    logits = logits * 3
    noise = torch.randn(4, 501, generator=torch.Generator().manual_seed(7))
    guide = logits + 0.02 * noise
    for terms in (Terms("forward"), Terms("reverse"), Terms("jsd")):
        exact = dense(logits.double(), guide.double(), terms) * weights
        inputs = (part.to(device) for part in (logits, guide, targets, weights))
        found, _ = run(kernel, *inputs, terms, None)
        assert exact.max() < 1e-3
        torch.testing.assert_close(found.cpu().double(), exact, rtol=1e-2, atol=3e-7)


def test_rows_without_weight_are_zero_whatever_they_hold(device):
    logits, guide, targets, weights = (part.to(device) for part in draw(3, 90, 8))
    logits[1], guide[1], weights[1] = float("nan"), float("inf"), 0.0
    grad = torch.full_like(logits, float("nan"))
    losses = run(kernel, logits, guide, targets, weights, Terms("reverse", ce=1.0), grad)
    assert grad[1].abs().max() == 0 and losses[0][1] == 0 and losses[1][1] == 0
    assert grad.isfinite().all() and grad[0].abs().max() > 0


def test_tokens_that_neither_model_gives_do_not_count(device, assert_near):
    """Logits of -inf, as a padded vocabulary has them."""
    logits, guide, targets, weights = draw(2, 70, 9)
    targets %= 60
    for terms in TERMS:
        exact = torch.empty(2, 60, dtype=torch.float64)
        cut = (part[:, :60].double() for part in (logits, guide))
        expected = run(reference, *cut, targets, weights.double(), terms, exact)
        wide = [part.clone().to(device) for part in (logits, guide)]
        for part in wide:
            part[:, 60:] = float("-inf")
        grad = torch.empty_like(wide[0])
        found = run(kernel, *wide, targets.to(device), weights.to(device), terms, grad)
        assert_near(grad[:, :60].cpu(), exact, 2e-5)
        assert grad[:, 60:].abs().max() == 0
        torch.testing.assert_close(found[0].cpu().double(), expected[0], rtol=2e-5, atol=1e-6)
