"""Attention of packed rows against softmax over a dense mask, differentiated in fp64.

fp32: 2e-5 of the largest value. bf16: two products one after the other, whose operands are rounded
once each (2^-8, the interpreter truncates): 2^-6 of the largest value.
"""

import pytest
import torch
import torch.nn.functional as F

triton = pytest.importorskip("triton")

from mambactl.kernels import dispatch, operators  # noqa: E402
from mambactl.kernels.reference import spans  # noqa: E402

pytestmark = pytest.mark.one_in(3)

BOUND = {torch.float32: 2e-5, torch.bfloat16: 2**-6}


@pytest.fixture(autouse=True)
def nan_in_fresh_memory():
    """Every torch.empty is full of NaN: what a kernel leaves out shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def numbered(length, batch=2):
    g = torch.Generator().manual_seed(length)
    return ((torch.rand(batch, length, generator=g) < 0.08).cumsum(1) % 3).int()


def draw(length, heads, kv_heads, width, kind=torch.float32, batch=2):
    """q, k, v and the gradient of y."""
    g = torch.Generator().manual_seed(length)
    q, k, v = (
        torch.randn(batch, length, n, width, generator=g).to(kind).transpose(1, 2)
        for n in (heads, kv_heads, kv_heads)
    )
    return (q, k, v), torch.randn(batch, length, heads, width, generator=g).to(kind)


def seen(numbers, length, window):
    """The mask written out pair by pair."""
    mask = torch.zeros(numbers.shape[0], length, length, dtype=torch.bool)
    for b, row in enumerate(numbers.tolist()):
        for t in range(length):
            for s in range(t, -1, -1):
                if row[s] != row[t] or (window and s <= t - window):
                    break
                mask[b, t, s] = True
    return mask


@pytest.mark.parametrize("window", [None, 1, 5, 40])
def test_spans_are_documents_and_windows(window) -> None:
    numbers = numbered(61)
    found = spans(numbers, numbers, window)
    mask = seen(numbers, 61, window)
    assert torch.equal(found.mask()[:, 0], mask)
    # the last query that sees a key, and one more
    last = 61 - mask.flip(1).float().argmax(1)
    assert torch.equal(found.ends, last.int())
    assert found.starts.dtype == found.ends.dtype == torch.int32


@pytest.mark.parametrize(
    "length, heads, kv_heads, width, window, kind",
    [
        (1, 2, 1, 16, None, torch.float32),
        (70, 4, 2, 16, None, torch.float32),
        (67, 3, 3, 5, 6, torch.float32),
        (70, 3, 1, 40, None, torch.bfloat16),
        (130, 2, 1, 64, 20, torch.bfloat16),
        # the head of an 8B model
        (150, 2, 1, 128, None, torch.bfloat16),
    ],
)
def test_gradients_equal_dense_attention(
    device, length, heads, kv_heads, width, window, kind
) -> None:
    inputs, dy = draw(length, heads, kv_heads, width, kind)
    found = spans(numbered(length), numbered(length), window)
    wide = [t.double().requires_grad_() for t in inputs]
    mask = seen(numbered(length), length, window)[:, None]
    y = F.scaled_dot_product_attention(*wide, attn_mask=mask, enable_gqa=True).transpose(1, 2)
    expected = [y, *torch.autograd.grad(y, wide, dy.double())]

    leaves = [t.to(device).requires_grad_() for t in inputs]
    y = operators.attend(*leaves, *(t.to(device) for t in found))[0]
    actual = [y, *torch.autograd.grad(y, leaves, dy.to(device))]
    for got, wanted in zip(actual, expected, strict=True):
        assert got.dtype == kind and got.shape == wanted.shape
        error = (got.detach().cpu().double() - wanted).abs().max()
        # a row of one token has no gradient of q and k at all
        assert error <= BOUND[kind] * wanted.abs().max().clamp(min=1)


def test_a_repeated_run_gives_the_same_bits(device) -> None:
    inputs, dy = draw(70, 2, 1, 16, torch.bfloat16)
    leaves = [t.to(device).requires_grad_() for t in inputs]
    found = [t.to(device) for t in spans(numbered(70), numbered(70), None)]
    y = operators.attend(*leaves, *found)[0]
    first, again = (
        torch.autograd.grad(y, leaves, dy.to(device), retain_graph=True) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_the_operator_is_what_compilers_expect(device) -> None:
    inputs, _ = draw(9, 2, 1, 4)
    leaves = [t.to(device).requires_grad_() for t in inputs]
    found = [t.to(device) for t in spans(numbered(9), numbered(9), None)]
    torch.library.opcheck(
        operators.attend,
        (*leaves, *found),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_whatever_serves_the_call_sees_the_same_keys(device, monkeypatch, kind) -> None:
    """The kernel, the dense mask it replaces, and what the kernel cannot take."""
    inputs = [t.to(device) for t in draw(40, 4, 2, 16, kind)[0]]
    numbers = numbered(40).to(device)
    found = spans(numbers, numbers, 9)
    plain = dispatch.attention(*inputs, found.mask())
    monkeypatch.setattr(dispatch, "_no_cuda", lambda device: None)
    monkeypatch.setattr(dispatch, "_no_triton", lambda: None)
    torch.testing.assert_close(dispatch.attention(*inputs, None, found), plain, rtol=0, atol=1e-5)
