"""Linear layers of the blocks with weights in 8 bits, for decoding, or rounded to what those hold.

Embedding, head, convolutions, norms and what decides the steps of a state (A_log, D, dt_bias,
x_proj and dt_proj) stay as they are.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from mambactl.errors import ResourceError
from mambactl.kernels import dispatch
from mambactl.kernels.fp8 import Fp8Matrix, quantise, rounded_to_fp8
from mambactl.models.hybrid import HybridForCausalLM

# below it a GPU converts no e4m3
LEAST_CAPABILITY = (8, 9)
# low-rank projections of Mamba-1, from which steps, B and C come
KEPT = ("x_proj", "dt_proj")


class Fp8Linear(nn.Module):
    """A linear map with an `Fp8Matrix` in place of its weight."""

    def __init__(self, matrix: Fp8Matrix, bias: Tensor | None):
        super().__init__()
        self.out_features, self.in_features = matrix.shape
        self.values = nn.Parameter(matrix.values, requires_grad=False)
        self.scale = nn.Parameter(matrix.scale, requires_grad=False)
        self.register_parameter("bias", bias)

    @property
    def weight(self) -> Fp8Matrix:
        """The matrix [N, K]; its tensors are the module's own."""
        return Fp8Matrix(self.values, self.scale)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N]."""
        return dispatch.fp8_linear(x, self.weight, self.bias)


def linears(model: HybridForCausalLM) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """Every linear layer of the blocks that 8 bits are for, with its parent and its name there."""
    for parent in model.model.layers.modules():
        for name, child in parent.named_children():
            if isinstance(child, nn.Linear) and name not in KEPT:
                yield parent, name, child


def require_fp8(device: torch.device) -> None:
    """Raise ResourceError for a GPU that has no instructions for e4m3."""
    if device.type != "cuda":
        return
    found = torch.cuda.get_device_capability(device)
    if found < LEAST_CAPABILITY:
        need = ".".join(map(str, LEAST_CAPABILITY))
        raise ResourceError(
            f"fp8 weights need a GPU of compute capability {need}, {device} has "
            f"{found[0]}.{found[1]}",
            "leave --weights out",
        )


@torch.no_grad()
def store_in_fp8(model: HybridForCausalLM) -> int:
    """Replace the weights of `linears` by ones of 8 bits, in place; returns the bytes saved."""
    saved = 0
    for parent, name, child in list(linears(model)):
        before = child.weight.nbytes
        matrix = quantise(child.weight)
        setattr(parent, name, Fp8Linear(matrix, child.bias))
        saved += before - matrix.values.nbytes - matrix.scale.nbytes
    return saved


@torch.no_grad()
def round_to_fp8(model: HybridForCausalLM) -> None:
    """Give the weights of `linears` the values that 8 bits hold, in place and in their own type."""
    for _, _, child in linears(model):
        child.weight.data.copy_(rounded_to_fp8(child.weight))
