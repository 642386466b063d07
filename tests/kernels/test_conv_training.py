"""The convolution with documents and gradients against the reference differentiated in fp64.

All sums are fp32 and rounded once: 1e-5 of the largest value, and in bf16 2^-8 for outputs in it.
"""

import pytest
import torch
import torch.nn.functional as F

triton = pytest.importorskip("triton")

from mambactl.kernels import operators, reference  # noqa: E402

pytestmark = pytest.mark.one_in(6)


@pytest.fixture(autouse=True)
def nan_in_fresh_memory():
    """Every torch.empty is full of NaN: what a kernel leaves out shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def documents(length, batch=2):
    g = torch.Generator().manual_seed(length)
    return ((torch.rand(batch, length, generator=g) < 0.25).cumsum(1) % 3).int()


def draw(length, channels, width, kind, weights, bias=True, previous=False):
    """(x, weight, bias, previous) and the gradient of y."""
    g = torch.Generator().manual_seed(length)
    return (
        torch.randn(2, length, channels, generator=g).to(kind),
        torch.randn(channels, width, generator=g).to(weights),
        torch.randn(channels, generator=g).to(weights) if bias else None,
        torch.randn(2, width - 1, channels, generator=g).to(kind) if previous else None,
    ), torch.randn(2, length, channels, generator=g).to(kind)


FP32, BF16 = torch.float32, torch.bfloat16


@pytest.mark.parametrize("kind, weights", [(FP32, FP32), (BF16, BF16), (BF16, FP32)])
@pytest.mark.parametrize(
    "length, channels, width, bias, previous",
    [(1, 5, 4, True, False), (70, 66, 4, True, True), (33, 7, 2, False, False)],
)
@pytest.mark.parametrize("packed", [True, False])
def test_gradients_equal_the_reference(
    device, assert_near, length, channels, width, bias, previous, packed, kind, weights
) -> None:
    inputs, dy = draw(length, channels, width, kind, weights, bias, previous)
    numbers = documents(length) if packed else None
    wide = [None if t is None else t.double().requires_grad_() for t in inputs]
    leaves = [t for t in wide[:3] if t is not None]
    wanted = F.silu(reference.causal_conv1d(*wide, numbers))
    theirs = torch.autograd.grad(wanted, leaves, dy.double())

    there = [None if t is None else t.to(device) for t in inputs]
    ours = [t.requires_grad_() for t in there[:3] if t is not None]
    y = operators.conv_silu(*there, None if numbers is None else numbers.to(device))
    found = torch.autograd.grad(y, ours, dy.to(device))
    for actual, target, leaf in zip((y, *found), (wanted, *theirs), (y, *ours), strict=True):
        assert actual.dtype == leaf.dtype
        bound = 2**-8 if actual.dtype == BF16 else 1e-5
        assert_near(actual.detach().cpu(), target.detach(), bound)


@pytest.mark.slow
def test_a_repeated_run_gives_the_same_bits(device) -> None:
    inputs, dy = draw(70, 20, 4, BF16, FP32)
    x, weight, bias = (t.to(device).requires_grad_() for t in inputs[:3])
    y = operators.conv_silu(x, weight, bias, None, documents(70).to(device))
    first, again = (
        torch.autograd.grad(y, (x, weight, bias), dy.to(device), retain_graph=True)
        for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_the_operator_is_what_compilers_expect(device) -> None:
    (x, weight, bias, _), _ = draw(9, 5, 4, FP32, FP32)
    leaves = [t.to(device).requires_grad_() for t in (x, weight, bias)]
    torch.library.opcheck(
        operators.conv_silu,
        (*leaves, None, documents(9).to(device)),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )
