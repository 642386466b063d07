"""Weights in 8 bits: their rounding, and the products of the reference with them.

A number of e4m3 has 4 significant bits, so rounding moves it by 2^-4 of itself at most; below
2^-6 of the scale the distance between numbers is 2^-9 of it. Integers are off by half of a scale.
"""

import pytest
import torch
from kernels.products import generator

from mambactl.kernels import byte_matrix


def draw(N: int, K: int, kind: torch.dtype = torch.float32) -> torch.Tensor:
    """Rows of magnitudes from 2^-20 to 2^15, one of them zero, one of them with one large entry."""
    g = generator(N, K)
    w = torch.randn(N, K, generator=g) * torch.exp2(torch.arange(N) % 36 - 20.0)[:, None]
    w[N // 2] = 0
    w[-1, 0] = 1e4 * w[-1].abs().max()
    return w.to(kind)


@pytest.fixture(params=["fp8", "int8"])
def stored(request) -> str:
    return request.param


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("N", "K"), [(1, 1), (41, 7), (72, 130)])
def test_rounding_is_to_the_nearest_number(N, K, kind) -> None:
    w = draw(N, K, kind)
    found = byte_matrix.quantise(w, "fp8")
    assert found.values.dtype == torch.float8_e4m3fn and found.shape == (N, K)
    scale = found.scale.double()
    assert torch.equal(scale.log2(), scale.log2().round())
    # every number that a row can hold, and the one that lies nearest
    numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    numbers = numbers[~numbers.isnan()]
    wanted = w.double() / scale[:, None]
    nearest = (wanted[..., None] - numbers).abs().amin(-1)
    assert torch.equal((found.values.double() - wanted).abs(), nearest)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_integers_reach_the_largest_of_each_row(kind) -> None:
    w = draw(41, 33, kind)
    found = byte_matrix.quantise(w, "int8")
    assert found.values.dtype == torch.int8 and found.bytes is found.values
    largest = found.values.long().abs().amax(1)
    assert largest[20] == 0 and (largest[torch.arange(41) != 20] == 127).all()
    off = (found.dense(torch.float64) - w.double()).abs().amax(1)
    assert (off <= found.scale.double() * (0.5 + 1e-5)).all()


def test_integers_are_the_finer_grid_for_normal_numbers() -> None:
    """On normal rows of 4,096 numbers e4m3 is off by 2.6 % of the norm, int8 by 0.9 %."""
    w = torch.randn(8, 4096, generator=generator(3))
    off = {
        stored: ((byte_matrix.rounded_to_bytes(w, stored) - w).norm() / w.norm()).item()
        for stored in ("fp8", "int8")
    }
    assert 0.02 < off["fp8"] < 0.03 and 0.007 < off["int8"] < 0.01


def test_scales_are_the_least_that_hold_a_row() -> None:
    largest = torch.tensor([448.0, 449, 224, 225, 0, 2**-30, 447.9, 3e38])
    w = torch.zeros(len(largest), 3)
    w[:, 1] = -largest
    scale = byte_matrix.row_scales(w, "fp8")
    assert scale[:5].tolist() == [1, 2, 0.5, 1, 1]
    used = largest[largest > 0] / scale[largest > 0]
    assert (used <= 448).all() and (used > 224).all()
    assert torch.equal(
        byte_matrix.quantise(w[:5], "fp8").dense(torch.float32)[[0, 2, 4]], w[[0, 2, 4]]
    )


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float64])
def test_rounded_weights_are_exact_in_every_type(kind) -> None:
    w = draw(41, 33).to(kind)
    rounded = byte_matrix.rounded_to_bytes(w, "fp8")
    assert rounded.dtype == kind
    assert torch.equal(rounded.double(), byte_matrix.quantise(w, "fp8").dense(torch.float64))
    assert torch.equal(byte_matrix.rounded_to_bytes(rounded, "fp8"), rounded)
    error = (rounded.double() - w.double()).abs()
    step = w.double().abs().amax(1, keepdim=True) / 224 * 2**-10
    assert (error <= torch.maximum(w.double().abs() * 2**-4, step)).all()
    assert (error > 0).any()


def test_rows_share_the_memory_of_the_matrix(stored) -> None:
    matrix = byte_matrix.quantise(draw(12, 8), stored)
    part = matrix[3:7]
    assert len(part) == 4 and part.values.data_ptr() == matrix.values[3].data_ptr()
    assert torch.equal(part.dense(torch.float32), matrix.dense(torch.float32)[3:7])


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
def test_a_linear_map_is_that_of_its_rounded_weights(stored, kind, bias) -> None:
    """Sums of 130 products differ by 2^-7 of the largest output in 16 bits, 1e-5 in fp32."""
    g = generator(bias)
    matrix = byte_matrix.quantise(torch.randn(37, 130, generator=g) / 11, stored)
    x = torch.randn(2, 3, 130, generator=g).to(kind)
    b = torch.randn(37, generator=g).to(kind) if bias else None
    expected = x.double() @ matrix.dense(torch.float64).T + (b.double() if bias else 0)
    y = byte_matrix.linear(x, matrix, b)
    assert y.dtype == kind
    error = (y.double() - expected).abs().max() / expected.abs().max()
    assert error <= (1e-5 if kind == torch.float32 else 2**-7)


def test_products_of_fp16_stay_in_range(stored) -> None:
    """Products with unscaled e4m3 numbers would overflow: 400 x 400 is beyond 65,504."""
    w = torch.full((2, 64), 0.4)
    x = torch.full((1, 64), 400.0, dtype=torch.float16)
    y = byte_matrix.linear(x, byte_matrix.quantise(w, stored))
    assert torch.isfinite(y).all() and (y - 400 * 64 * 0.4).abs().max() < 400
