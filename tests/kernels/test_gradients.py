"""Analytic gradients against finite differences in fp64."""

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from mambactl.kernels import reference as kernels

pytestmark = pytest.mark.one_in(3)

LENGTH = 7
PACKED = torch.tensor([[0, 0, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 3, 3]])


def leaves(inputs) -> list[Tensor]:
    return [t.double().requires_grad_() for t in inputs]


@pytest.mark.parametrize("seq_idx", [None, PACKED], ids=["whole", "packed"])
@pytest.mark.parametrize("chunk", [3, 64])
def test_ssd(draw_ssd, chunk, seq_idx) -> None:
    inputs = leaves(draw_ssd(2, LENGTH, groups=1, heads=2, width=2, size=3))
    assert gradcheck(lambda *a: kernels.ssd(*a, seq_idx, chunk), inputs)


@pytest.mark.parametrize("seq_idx", [None, PACKED], ids=["whole", "packed"])
def test_selective_scan(draw_scan, seq_idx) -> None:
    inputs = leaves(draw_scan(2, LENGTH, groups=2, channels=4, size=2))
    assert gradcheck(lambda *a: kernels.selective_scan(*a, seq_idx), inputs)


@pytest.mark.parametrize("seq_idx", [None, PACKED], ids=["whole", "packed"])
def test_causal_conv1d(seq_idx) -> None:
    g = torch.Generator().manual_seed(0)
    shapes = [(2, LENGTH, 3), (3, 4), (3,), (2, 3, 3)]
    inputs = leaves(torch.randn(shape, generator=g) for shape in shapes)
    assert gradcheck(lambda *a: kernels.causal_conv1d(*a, seq_idx), inputs)
