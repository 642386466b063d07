"""Weights in 8 bits with a scale for each row: float8_e4m3fn, or integers.

    W[n, k] ~ scale[n] values[n, k]
e4m3 (arXiv 2209.05433) has 4 bits of exponent, 3 of fraction and magnitudes up to 448. Its scales
are powers of two, which costs no precision in a floating-point format and makes the weights exact
in bf16 and fp32: every engine multiplies by the same numbers. Integers from -127 to 127 are the
finer grid where a row's numbers are of similar size: of normal ones the rounding is a third of
e4m3's. Their products with a scale are exact in fp32 but for its own rounding.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Kind = Literal["fp8", "int8"]
TYPES: dict[Kind, torch.dtype] = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}
LARGEST: dict[Kind, float] = {"fp8": 448.0, "int8": 127.0}


@dataclass(frozen=True)
class ByteMatrix:
    """A matrix [N, K] in e4m3 or int8, and the scales [N] of its rows in fp32."""

    values: Tensor
    scale: Tensor

    @property
    def shape(self) -> torch.Size:
        """Shape (N, K) of the matrix."""
        return self.values.shape

    @property
    def bytes(self) -> Tensor:
        """The values as kernels read them: uint8 for e4m3."""
        return self.values if self.values.dtype == torch.int8 else self.values.view(torch.uint8)

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, rows: slice) -> "ByteMatrix":
        """Slice of rows that shares the memory."""
        return ByteMatrix(self.values[rows], self.scale[rows])

    def dense(self, kind: torch.dtype) -> Tensor:
        """The matrix in another type."""
        exact = torch.float64 if kind == torch.float64 else torch.float32
        return (self.values.to(exact) * self.scale.to(exact)[:, None]).to(kind)


# what a product multiplies by
Matrix = Tensor | ByteMatrix


def row_scales(weight: Tensor, kind: Kind) -> Tensor:
    """The least scales [N] by which the rows of weight [N, K] fit: powers of two for e4m3."""
    least = weight.detach().abs().amax(1).float() / LARGEST[kind]  # [N]
    scale = least
    if kind == "fp8":
        fraction, exponent = torch.frexp(least)
        # fraction 2^exponent with a fraction from 1/2 on: exactly 1/2 needs one less
        exponent = torch.where(fraction == 0.5, exponent - 1, exponent)
        scale = torch.ldexp(torch.ones_like(least), exponent)
    return torch.where(least > 0, scale, 1.0)


@torch.no_grad()
def quantise(weight: Tensor, kind: Kind) -> ByteMatrix:
    """Round each number of weight [N, K] to the nearest that its row can hold."""
    scale = row_scales(weight, kind)
    wanted = weight.float() / scale[:, None]
    return ByteMatrix((wanted.round() if kind == "int8" else wanted).to(TYPES[kind]), scale)


def rounded_to_bytes(weight: Tensor, kind: Kind) -> Tensor:
    """The numbers that `quantise` keeps of a weight [N, K], in the weight's own type."""
    return quantise(weight, kind).dense(weight.dtype)


def linear(x: Tensor, w: ByteMatrix, bias: Tensor | None = None) -> Tensor:
    """Multiply x [..., K] by W^T, rounded to the type of x, and add the bias: [..., N]."""
    # in place: the values are exact in every type, and are scaled in fp32
    return F.linear(x, w.values.to(x.dtype).mul_(w.scale[:, None]), bias)
