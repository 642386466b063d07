"""Mamba-2 with gradients and documents against the reference differentiated in fp64.

fp32: 2e-5 of the largest value. bf16: a value passes at most four products one after the other,
each of which rounds an operand (2^-9 of it, 2^-8 in the interpreter, which truncates where a kernel
does not round by itself): 2^-6 of the largest value bounds all of them.
"""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")

from mambactl.kernels import operators, reference  # noqa: E402
from mambactl.kernels.launch import INTERPRETED  # noqa: E402

pytestmark = pytest.mark.one_in(6)

BOUND = {torch.float32: 2e-5, torch.bfloat16: 2**-6}
NAMES = ("y", "final", "dx", "ddt", "dA", "dB", "dC", "dstate")


class Case(NamedTuple):
    """Inputs, and gradients of what comes out."""

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    state: Tensor
    dy: Tensor
    d_final: Tensor


@pytest.fixture(autouse=True)
def nan_in_fresh_memory():
    """Every torch.empty is full of NaN: what a kernel leaves out shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


def draw(
    length, heads=2, x_heads=2, key=1, query=1, width=16, size=16, batch=1, kind=torch.float32
):
    g = torch.Generator().manual_seed(length)
    return Case(
        torch.randn(batch, length, x_heads, width, generator=g).to(kind),
        10 ** (-3 * torch.rand(batch, length, heads, generator=g)),
        -(1 + 15 * torch.rand(heads, generator=g)),
        torch.randn(batch, length, key, size, generator=g).to(kind),
        torch.randn(batch, length, query, size, generator=g).to(kind),
        torch.randn(batch, heads, width, size, generator=g),
        torch.randn(batch, length, heads, width, generator=g).to(kind),
        torch.randn(batch, heads, width, size, generator=g),
    )


def documents(length, batch=1):
    """Numbers that come back, and documents of one token."""
    g = torch.Generator().manual_seed(length + 1)
    return ((torch.rand(batch, length, generator=g) < 0.1).cumsum(1) % 3).int()


def run(case: Case, numbers: Tensor | None, device) -> list[Tensor]:
    inputs = [t.to(device).requires_grad_() for t in case[:6]]
    numbers = None if numbers is None else numbers.to(device)
    y, final, _ = operators.ssd(*inputs, numbers)
    assert y.dtype == case.x.dtype and final.dtype == torch.float32
    upstream = [case.dy.to(device), case.d_final.to(device)]
    gradients = torch.autograd.grad([y, final], inputs, upstream)
    assert [t.dtype for t in gradients] == [t.dtype for t in inputs]
    return [t.detach().cpu() for t in (y, final, *gradients)]


def expected(case: Case, numbers: Tensor | None) -> list[Tensor]:
    inputs = [t.double().requires_grad_() for t in case[:6]]
    x = inputs[0].repeat_interleave(case.dt.shape[2] // case.x.shape[2], 2)
    y, final = reference.ssd(x, *inputs[1:], numbers)
    upstream = [case.dy.double(), case.d_final.double()]
    return [t.detach() for t in (y, final, *torch.autograd.grad([y, final], inputs, upstream))]


def compare(case: Case, numbers: Tensor | None, device, assert_near) -> None:
    pairs = zip(NAMES, run(case, numbers, device), expected(case, numbers), strict=True)
    for name, actual, wanted in pairs:
        try:
            assert_near(actual, wanted, BOUND[case.x.dtype])
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("length", [1, 64, 70])
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "whole"])
def test_gradients_equal_the_reference(device, assert_near, length, packed, kind) -> None:
    case = draw(length, x_heads=1, query=2, kind=kind)
    compare(case, documents(length) if packed else None, device, assert_near)


@pytest.mark.parametrize(
    "shape",
    [
        {"heads": 6, "x_heads": 2, "key": 3, "query": 6, "width": 5, "size": 6},
        {"heads": 6, "x_heads": 2, "key": 2, "query": 6, "width": 20, "size": 12},
        {"heads": 4, "x_heads": 4, "key": 1, "query": 2, "width": 20, "size": 40},
        {"heads": 1, "x_heads": 1, "width": 70, "size": 66},
        {"batch": 2, "width": 1, "size": 1},
    ],
)
def test_odd_shapes_and_groups(device, assert_near, shape) -> None:
    compare(draw(37, **shape), documents(37, shape.get("batch", 1)), device, assert_near)


def test_heads_as_wide_as_those_of_an_8b_model(device, assert_near) -> None:
    # a GPU takes as many heads to a group as that model has
    heads = 2 if INTERPRETED else 4
    case = draw(70, heads=heads, x_heads=1, query=heads, width=128, size=128, kind=torch.bfloat16)
    compare(case, documents(70), device, assert_near)


def test_tokens_that_forget_everything(device, assert_near) -> None:
    case = draw(70)
    for at in (3, 40, 65, 66):
        case.dt[:, at] = 1e5
        # dt multiplies the inputs as well: keep what those tokens add in range
        case.x[:, at] *= 1e-5
    case.dt[:, 50:60] = 0
    case.dt[:, 10:30] = 1e-7
    # of those tokens the gradient of dt is that of the input alone, as large as everything else
    compare(case, None, device, assert_near)


def test_the_decay_of_a_first_token_has_no_gradient_and_its_input_has(device) -> None:
    case = draw(40, heads=1, x_heads=1)
    numbers = (torch.arange(40) // 20)[None].int()
    (y, _, dx, ddt, *_), A = run(case, numbers, device), case.A
    other = case._replace(A=2 * A)
    moved = run(other, numbers, device)
    # the first output of the second document does not depend on A, the second does
    assert torch.equal(y[:, 20], moved[0][:, 20])
    assert not torch.equal(y[:, 21], moved[0][:, 21])
    by_input = (dx[:, 20] * case.x[:, 20]).sum((-1, -2)) / case.dt[:, 20, 0]
    torch.testing.assert_close(ddt[:, 20, 0], by_input, rtol=1e-4, atol=1e-4)


def test_what_is_not_wanted_may_be_missing(device, assert_near) -> None:
    """No state to start from, no gradient of the state that is left, or of y."""
    case, numbers = draw(40), documents(40)
    wide = [t.double().requires_grad_() for t in case[:5]]
    inputs = [t.to(device).requires_grad_() for t in case[:5]]
    outputs = operators.ssd(*inputs, None, numbers.to(device))
    wanted = reference.ssd(*wide, None, numbers)
    for i, upstream in enumerate((case.dy, case.d_final)):
        ours = torch.autograd.grad(outputs[i], inputs[:4], upstream.to(device), retain_graph=True)
        theirs = torch.autograd.grad(wanted[i], wide[:4], upstream.double(), retain_graph=True)
        for actual, target in zip(ours, theirs, strict=True):
            assert_near(actual.cpu(), target, BOUND[torch.float32])


def test_strided_inputs_between_nan(device, assert_near) -> None:
    """x, B and C are slices of one buffer, as the mixer gives them, and dy is transposed."""
    case, numbers = draw(40), documents(40)
    store = torch.full((1, 43, 2 * 16 + 2 * 16 + 9), float("nan"))
    flat = store[:, 2:42, 5:-4]
    flat.copy_(torch.cat([t.flatten(2) for t in (case.x, case.B, case.C)], -1))
    x, B, C = flat.split([32, 16, 16], -1)
    views = case._replace(
        x=x.unflatten(-1, (2, 16)), B=B.unflatten(-1, (1, 16)), C=C.unflatten(-1, (1, 16)),
        dy=case.dy.transpose(1, 2).contiguous().transpose(1, 2),
    )  # fmt: skip
    compare(views, numbers, device, assert_near)


def test_a_repeated_run_gives_the_same_bits(device) -> None:
    case, numbers = draw(70, x_heads=1, query=2, kind=torch.bfloat16), documents(70)
    for first, again in zip(run(case, numbers, device), run(case, numbers, device), strict=True):
        assert torch.equal(first, again)


def test_the_operator_is_what_compilers_expect(device) -> None:
    case = draw(20, width=4, size=4)
    inputs = [t.to(device).requires_grad_() for t in case[:6]]
    torch.library.opcheck(
        operators.ssd,
        (*inputs, documents(20).to(device)),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )
