"""Weights in 8 bits: float8_e4m3fn values and a power of two for each row.

    W[n, k] ~ scale[n] values[n, k]
e4m3 (arXiv 2209.05433) has 4 bits of exponent, 3 of fraction and magnitudes up to 448. A scale that
is a power of two costs no precision in a floating-point format, and makes the weights exact in
bf16, fp16 (before scaling) and fp32: every engine multiplies by the same numbers.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0


@dataclass(frozen=True)
class Fp8Matrix:
    """A matrix [N, K] in e4m3, and its scales [N], powers of two in fp32."""

    values: Tensor
    scale: Tensor

    @property
    def shape(self) -> torch.Size:
        """(N, K)."""
        return self.values.shape

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, rows: slice) -> "Fp8Matrix":
        """Some of the rows, in the same memory."""
        return Fp8Matrix(self.values[rows], self.scale[rows])

    def dense(self, kind: torch.dtype) -> Tensor:
        """The matrix in another type, exact in bf16, fp32 and fp64."""
        return self.values.to(kind) * self.scale.to(kind)[:, None]


# what a product multiplies by
Matrix = Tensor | Fp8Matrix


def row_scales(weight: Tensor) -> Tensor:
    """The least powers of two [N] by which the rows of weight [N, K] fit into e4m3."""
    largest = weight.detach().abs().amax(1).float()  # [N]
    fraction, exponent = torch.frexp(largest / LARGEST)
    # fraction 2^exponent with a fraction from 1/2 on: exactly 1/2 needs one less
    exponent = torch.where(fraction == 0.5, exponent - 1, exponent)
    return torch.where(largest > 0, torch.ldexp(torch.ones_like(largest), exponent), 1.0)


@torch.no_grad()
def quantise(weight: Tensor) -> Fp8Matrix:
    """weight [N, K], each number rounded to the nearest that e4m3 has under its row's scale."""
    scale = row_scales(weight)
    return Fp8Matrix((weight.float() / scale[:, None]).to(E4M3), scale)


def rounded_to_fp8(weight: Tensor) -> Tensor:
    """The numbers that `quantise` keeps of a weight [N, K], in the weight's own type."""
    return quantise(weight).dense(weight.dtype)


def linear(x: Tensor, w: Fp8Matrix, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias [..., N] in the type of x [..., K]."""
    if x.dtype == torch.float16:
        # products with what is not scaled yet could leave the range of fp16
        return F.linear(x, w.dense(x.dtype), bias)
    y = F.linear(x, w.values.to(x.dtype)) * w.scale.to(x.dtype)
    return y if bias is None else y + bias
