"""Weights in 8 bits: their rounding, and the products of the reference with them.

A number of e4m3 has 4 significant bits, so rounding moves it by 2^-4 of itself at most; below
2^-6 of the scale the distance between numbers is 2^-9 of it.
"""

import pytest
import torch
from kernels.products import generator

from mambactl.kernels import fp8


def draw(N: int, K: int, kind: torch.dtype = torch.float32) -> torch.Tensor:
    """Rows of magnitudes from 2^-20 to 2^15, one of them zero, one of them with one large entry."""
    g = generator(N, K)
    w = torch.randn(N, K, generator=g) * torch.exp2(torch.arange(N) % 36 - 20.0)[:, None]
    w[N // 2] = 0
    w[-1, 0] = 1e4 * w[-1].abs().max()
    return w.to(kind)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("N", "K"), [(1, 1), (41, 7), (72, 130)])
def test_rounding_is_to_the_nearest_number(N, K, kind) -> None:
    w = draw(N, K, kind)
    found = fp8.quantise(w)
    assert found.values.dtype == torch.float8_e4m3fn and found.shape == (N, K)
    scale = found.scale.double()
    assert torch.equal(scale.log2(), scale.log2().round())
    # every number that a row can hold, and the one that lies nearest
    numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    numbers = numbers[~numbers.isnan()]
    wanted = w.double() / scale[:, None]
    nearest = (wanted[..., None] - numbers).abs().amin(-1)
    assert torch.equal((found.values.double() - wanted).abs(), nearest)


def test_scales_are_the_least_that_hold_a_row() -> None:
    largest = torch.tensor([448.0, 449, 224, 225, 0, 2**-30, 447.9, 3e38])
    w = torch.zeros(len(largest), 3)
    w[:, 1] = -largest
    scale = fp8.row_scales(w)
    assert scale[:5].tolist() == [1, 2, 0.5, 1, 1]
    used = largest[largest > 0] / scale[largest > 0]
    assert (used <= 448).all() and (used > 224).all()
    assert torch.equal(fp8.quantise(w[:5]).dense(torch.float32)[[0, 2, 4]], w[[0, 2, 4]])


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float64])
def test_rounded_weights_are_exact_in_every_type(kind) -> None:
    w = draw(41, 33).to(kind)
    rounded = fp8.rounded_to_fp8(w)
    assert rounded.dtype == kind
    assert torch.equal(rounded.double(), fp8.quantise(w).dense(torch.float64))
    assert torch.equal(fp8.rounded_to_fp8(rounded), rounded)
    error = (rounded.double() - w.double()).abs()
    step = w.double().abs().amax(1, keepdim=True) / 224 * 2**-10
    assert (error <= torch.maximum(w.double().abs() * 2**-4, step)).all()
    assert (error > 0).any()


def test_rows_share_the_memory_of_the_matrix() -> None:
    matrix = fp8.quantise(draw(12, 8))
    part = matrix[3:7]
    assert len(part) == 4 and part.values.data_ptr() == matrix.values[3].data_ptr()
    assert torch.equal(part.dense(torch.float32), matrix.dense(torch.float32)[3:7])


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
def test_a_linear_map_is_that_of_its_rounded_weights(kind, bias) -> None:
    """Of sums of 130 products: 2^-7 in 16 bits, 1e-5 in fp32, of the largest output."""
    g = generator(bias)
    matrix = fp8.quantise(torch.randn(37, 130, generator=g) / 11)
    x = torch.randn(2, 3, 130, generator=g).to(kind)
    b = torch.randn(37, generator=g).to(kind) if bias else None
    expected = x.double() @ matrix.dense(torch.float64).T + (b.double() if bias else 0)
    y = fp8.linear(x, matrix, b)
    assert y.dtype == kind
    error = (y.double() - expected).abs().max() / expected.abs().max()
    assert error <= (1e-5 if kind == torch.float32 else 2**-7)


def test_products_of_fp16_stay_in_range() -> None:
    """Sums of unscaled e4m3 would not: 400 x 400 is beyond 65,504."""
    w = torch.full((2, 64), 0.4)
    y = fp8.linear(torch.full((1, 64), 400.0, dtype=torch.float16), fp8.quantise(w))
    assert torch.isfinite(y).all() and (y - 400 * 64 * 0.4).abs().max() < 400
