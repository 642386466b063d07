"""Prefill kernels against the reference in fp64, fed the same (rounded) inputs.

fp32: 2e-5 of the largest value. bf16, Mamba-2: an operand of every product is rounded once
(2^-8 of it at most, 2^-7 in the interpreter, which truncates), so outputs are bounded element by
element by that share, once for dt x or the score and once for the state, of the same sums over
absolute values. bf16, Mamba-1: as fp32, since nothing is rounded.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

triton = pytest.importorskip("triton")

from mambactl.kernels import reference  # noqa: E402
from mambactl.kernels.launch import INTERPRETED  # noqa: E402
from mambactl.kernels.sequence import conv, selective, ssd  # noqa: E402

pytestmark = pytest.mark.one_in(3)

FP32 = 2e-5
ROUNDING = 2**-7 if INTERPRETED else 2**-8
LENGTHS = [1, 63, 64, 65, 130]


@pytest.fixture(autouse=True)
def nan_in_fresh_memory():
    """Every torch.empty is full of NaN: what a kernel leaves out shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


def poisoned(*tensors: Tensor) -> list[Tensor]:
    """The same [B, T, ...] values as slices of one buffer whose other elements are NaN."""
    batch, length = tensors[0].shape[:2]
    widths = [t[0, 0].numel() for t in tensors]
    store = tensors[0].new_full((batch, length + 3, sum(widths) + 7), float("nan"))
    flat = store[:, 2 : 2 + length, 5 : 5 + sum(widths)]
    views = flat.split(widths, -1)
    for view, t in zip(views, tensors, strict=True):
        view.copy_(t.flatten(2))
    return [v.unflatten(-1, t.shape[2:]) for v, t in zip(views, tensors, strict=True)]


def draw_ssd(length, heads=2, x_heads=2, key=1, query=1, width=16, size=16, batch=1, seed=0):
    g = torch.Generator().manual_seed(seed)
    return (
        torch.randn(batch, length, x_heads, width, generator=g),
        10 ** (-3 * torch.rand(batch, length, heads, generator=g)),
        -(1 + 15 * torch.rand(heads, generator=g)),
        torch.randn(batch, length, key, size, generator=g),
        torch.randn(batch, length, query, size, generator=g),
        torch.randn(batch, heads, width, size, generator=g),
    )


def draw_scan(length, channels=8, key=1, query=1, size=4, batch=1, seed=0):
    g = torch.Generator().manual_seed(seed)
    return (
        torch.randn(batch, length, channels, generator=g),
        10 ** (-3 * torch.rand(batch, length, channels, generator=g)),
        -(1 + 15 * torch.rand(channels, size, generator=g)),
        torch.randn(batch, length, key, size, generator=g),
        torch.randn(batch, length, query, size, generator=g),
        torch.randn(batch, channels, size, generator=g),
    )


def expected_ssd(inputs, absolute=False) -> tuple[Tensor, Tensor]:
    x, dt, A, B, C, state = (None if t is None else t.double() for t in inputs)
    x = x.repeat_interleave(dt.shape[2] // x.shape[2], 2)
    if absolute:
        x, B, C, state = (None if t is None else t.abs() for t in (x, B, C, state))
    return reference.ssd(x, dt, A, B, C, state)


def run_ssd(inputs, device, chunk_size=64) -> tuple[Tensor, Tensor]:
    x, dt, A, B, C, state = (None if t is None else t.to(device) for t in inputs)
    x, B, C = poisoned(x, B, C)
    y, final = ssd.ssd(x, dt, A, B, C, state, chunk_size)
    assert y.dtype == final.dtype == torch.float32
    return y.cpu(), final.cpu()


@pytest.mark.parametrize("length", LENGTHS)
def test_ssd_equals_the_reference(device, assert_near, length) -> None:
    inputs = draw_ssd(length, seed=length)
    for actual, expected in zip(run_ssd(inputs, device), expected_ssd(inputs), strict=True):
        assert_near(actual, expected, FP32)


@pytest.mark.parametrize(
    "shape",
    [
        {"heads": 9, "x_heads": 3, "key": 3, "query": 9, "width": 5, "size": 6},
        {"heads": 3, "x_heads": 3, "key": 1, "query": 3, "width": 48, "size": 40},
        {"width": 70, "size": 130, "heads": 1, "x_heads": 1},
        {"batch": 2, "width": 1, "size": 1},
    ],
)
def test_ssd_of_odd_shapes_and_groups(device, assert_near, shape) -> None:
    inputs = draw_ssd(37, **shape)
    for actual, expected in zip(run_ssd(inputs, device), expected_ssd(inputs), strict=True):
        assert_near(actual, expected, FP32)


@pytest.mark.parametrize("chunk_size", [1, 100, 256])
def test_ssd_in_other_chunks_without_a_state(device, assert_near, chunk_size) -> None:
    inputs = (*draw_ssd(150, heads=1, x_heads=1)[:5], None)
    actual = run_ssd(inputs, device, chunk_size)
    for got, expected in zip(actual, expected_ssd(inputs), strict=True):
        assert_near(got, expected, FP32)


def test_ssd_stays_exact_after_tokens_that_forget_everything(device, assert_near) -> None:
    x, dt, A, B, C, state = draw_ssd(130)
    dt[:, [3, 40, 65, 66, 129]] = 1e5
    dt[:, 90] = 1e30
    dt[:, 70:80] = 0
    dt[:, 10:30] = 1e-7
    # dt multiplies the inputs as well: keep what those tokens add in range
    x[:, [3, 40, 65, 66, 129]] *= 1e-5
    x[:, 90] = 0
    # token by token: no fp64 sum of logarithms survives 1e30
    wide = [t.double() for t in (x, dt, A, B, C, state)]
    step = reference.bind(reference.ssd_step, wide[2])
    expected = reference.recur(step, wide[5], (wide[0], wide[1], wide[3]), wide[4])
    actual = run_ssd((x, dt, A, B, C, state), device)
    for got, wanted in zip(actual, expected, strict=True):
        assert_near(got, wanted, FP32)


@pytest.mark.parametrize("length", [65, 200])
def test_ssd_in_bf16_rounds_each_operand_once(device, length) -> None:
    x, dt, A, B, C, state = draw_ssd(length, width=24, size=20, x_heads=1, seed=1)
    x, B, C = (t.bfloat16() for t in (x, B, C))
    inputs = x, dt, A, B, C, state
    actual = run_ssd(inputs, device)
    bounds = expected_ssd(inputs, absolute=True)
    for got, expected, bound in zip(actual, expected_ssd(inputs), bounds, strict=True):
        error = (got.double() - expected).abs()
        assert (error <= 2 * ROUNDING * bound + FP32 * expected.abs().max()).all()


def test_padding_of_a_ragged_row_changes_nothing(device, assert_near) -> None:
    inputs = draw_ssd(70)
    x, dt, B = reference.mask_records((inputs[0], inputs[1], inputs[3]), torch.tensor([41]))
    C = inputs[4].clone()
    C[:, 41:] = float("nan")
    y, state = run_ssd((x, dt, inputs[2], B, C, inputs[5]), device)
    short = [t[:, :41] for t in (x, dt, B, C)]
    expected = expected_ssd((short[0], short[1], inputs[2], short[2], short[3], inputs[5]))
    assert_near(y[:, :41], expected[0], FP32)
    assert_near(state, expected[1], FP32)


def expected_scan(inputs) -> tuple[Tensor, Tensor]:
    return reference.selective_scan(*(None if t is None else t.double() for t in inputs))


def run_scan(inputs, device) -> tuple[Tensor, Tensor]:
    x, dt, A, B, C, state = (None if t is None else t.to(device) for t in inputs)
    x, B, C = poisoned(x, B, C)
    y, final = selective.selective_scan(x, poisoned(dt)[0], A, B, C, state)
    assert y.dtype == final.dtype == torch.float32
    return y.cpu(), final.cpu()


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [1, 2, 3, 63, 64, 65, 130])
def test_scan_equals_the_reference(device, assert_near, length, kind) -> None:
    x, dt, A, B, C, state = draw_scan(length, seed=length)
    inputs = x.to(kind), dt, A, B.to(kind), C.to(kind), state
    for actual, expected in zip(run_scan(inputs, device), expected_scan(inputs), strict=True):
        assert_near(actual, expected, FP32)


@pytest.mark.parametrize(
    "shape",
    [
        {"channels": 12, "key": 2, "query": 4, "size": 6},
        {"channels": 30, "key": 3, "query": 2, "size": 5},
        {"channels": 11, "size": 16, "batch": 2},
        {"channels": 1, "size": 1},
    ],
)
@pytest.mark.parametrize("start", [True, False])
def test_scan_of_odd_shapes_and_groups(device, assert_near, shape, start) -> None:
    inputs = draw_scan(9, **shape)
    inputs = inputs if start else (*inputs[:5], None)
    for actual, expected in zip(run_scan(inputs, device), expected_scan(inputs), strict=True):
        assert_near(actual, expected, FP32)


def test_scan_with_extreme_decays(device, assert_near) -> None:
    x, dt, A, B, C, state = draw_scan(40)
    dt[:, [3, 4, 17]], dt[:, 20:25], dt[:, 30:] = 1e5, 0, 1e-7
    x[:, [3, 4, 17]] *= 1e-5
    inputs = x, dt, A, B, C, state
    for actual, expected in zip(run_scan(inputs, device), expected_scan(inputs), strict=True):
        assert_near(actual, expected, FP32)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "length, channels, width", [(1, 5, 4), (2, 3, 4), (35, 130, 4), (17, 7, 2)]
)
@pytest.mark.parametrize("previous, bias", [(True, True), (False, False)])
def test_convolution_rounds_once(device, kind, length, channels, width, previous, bias) -> None:
    g = torch.Generator().manual_seed(length)
    x = torch.randn(2, length, channels, generator=g).to(kind)
    weight = torch.randn(channels, width, generator=g).to(kind)
    shift = torch.randn(channels, generator=g).to(kind) if bias else None
    before = torch.randn(2, width - 1, channels, generator=g).to(kind) if previous else None
    wide = (None if t is None else t.double() for t in (x, weight, shift, before))
    expected = F.silu(reference.causal_conv1d(*wide))
    there = [None if t is None else t.to(device) for t in (weight, shift, before)]
    y = conv.causal_conv1d_silu(poisoned(x.to(device))[0], *there).cpu()
    assert y.dtype == kind
    rounded = 0 if kind == torch.float32 else ROUNDING
    error = (y.double() - expected).abs()
    assert (error <= rounded * expected.abs() + 1e-6 * expected.abs().max()).all()


def test_convolution_does_not_depend_on_the_split(device) -> None:
    g = torch.Generator().manual_seed(0)
    x, weight = torch.randn(1, 40, 9, generator=g), torch.randn(9, 4, generator=g)
    x, weight = x.to(device), weight.to(device)
    whole = conv.causal_conv1d_silu(x, weight, None)
    late = conv.causal_conv1d_silu(x[:, 23:], weight, None, x[:, 20:23])
    assert torch.equal(whole[:, 23:], late)
