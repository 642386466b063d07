"""Linear layers of the blocks with weights in 8 bits, for decoding, or rounded to what those hold.

Embedding, head, convolutions, norms and what decides the steps of a state (A_log, D, dt_bias,
x_proj and dt_proj) stay as they are.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from mambactl import console
from mambactl.errors import ModelError, ResourceError
from mambactl.kernels import dispatch
from mambactl.kernels.byte_matrix import TYPES, ByteMatrix, Kind, quantise, rounded_to_bytes
from mambactl.models.hybrid import HybridForCausalLM
from mambactl.models.mixers.sizes import FLOAT32_PARAMETERS
from mambactl.options.fields import StoredWeights
from mambactl.units import decimal_size

# below it a GPU converts no e4m3; the kernels that read integers are for all that have kernels
LEAST_CAPABILITY = {"fp8": (8, 9), "int8": dispatch.LEAST_CAPABILITY}
# low-rank projections of Mamba-1, from which steps, B and C come
KEPT = ("x_proj", "dt_proj")
# numbers in a row that kernels read at once
TOGETHER = 4


class ByteLinear(nn.Module):
    """A linear map with a `ByteMatrix` in place of its weight."""

    bias: nn.Parameter | None

    def __init__(self, matrix: ByteMatrix, bias: nn.Parameter | None):
        super().__init__()
        self.out_features, self.in_features = matrix.shape
        self.values = nn.Parameter(matrix.values, requires_grad=False)
        self.scale = nn.Parameter(matrix.scale, requires_grad=False)
        self.register_parameter("bias", bias)

    @property
    def weight(self) -> ByteMatrix:
        """The matrix [N, K]; its tensors are the module's own."""
        return ByteMatrix(self.values, self.scale)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N]."""
        return dispatch.byte_linear(x, self.weight, self.bias)


def linears(model: HybridForCausalLM) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """Linear layers of the blocks to be stored in 8 bits, with their parents and names there."""
    for parent in model.model.layers.modules():
        for name, child in parent.named_children():
            if isinstance(child, nn.Linear) and name not in KEPT:
                yield parent, name, child


def require_weights(weights: StoredWeights, device: torch.device) -> None:
    """Raise ResourceError where a device cannot decode with weights stored like that."""
    if weights == "auto" or device.type != "cuda":
        return
    found = torch.cuda.get_device_capability(device)
    if found < (least := LEAST_CAPABILITY[weights]):
        need = ".".join(map(str, least))
        raise ResourceError(
            f"{weights} weights need a GPU of compute capability {need}, {device} has "
            f"{found[0]}.{found[1]}",
            "leave --weights out",
        )


def for_decoding(
    model: HybridForCausalLM, weights: StoredWeights, name: str = ""
) -> HybridForCausalLM:
    """Store the weights in place as `weights` asks, and return the model, called `name`.

    A CPU reads no bytes: it keeps the rounded values in the type that they have.
    """
    if weights == "auto":
        return model
    if model.device.type == "cuda":
        before = sum(parameter.nbytes for parameter in model.parameters())
        saved = store_in_bytes(model, weights)
        after = f"{decimal_size(saved)} of {decimal_size(before)} saved"
        console.log(f"{_of(name)}weights of linear layers in {weights}: {after}")
    else:
        round_to_bytes(model, weights)
        kind = str(model.dtype).removeprefix("torch.")
        rounded = f"weights rounded to {weights}; a CPU keeps them in {kind}"
        console.log(f"{_of(name)}{rounded}, so no memory is saved")
    return model


def _of(name: str) -> str:
    return f"{name}: " if name else ""


@torch.no_grad()
def store_in_bytes(model: HybridForCausalLM, kind: Kind) -> int:
    """Replace the weights of `linears` by ones of 8 bits, in place; returns the bytes saved.

    Raises ModelError for rows that the kernels cannot read.
    """
    saved, found = 0, list(linears(model))
    odd = {child.in_features for *_, child in found if child.in_features % TOGETHER}
    if odd:
        raise ModelError(
            f"weights in 8 bits need rows of a multiple of {TOGETHER} numbers, here some have "
            f"{min(odd)}",
            "leave --weights out",
        )
    for parent, name, child in found:
        before = child.weight.nbytes
        matrix = quantise(child.weight, kind)
        setattr(parent, name, ByteLinear(matrix, child.bias))
        saved += before - matrix.values.nbytes - matrix.scale.nbytes
    return saved


@torch.no_grad()
def round_to_bytes(model: HybridForCausalLM, kind: Kind) -> None:
    """Give the weights of `linears` the values that 8 bits hold, in place and in their own type."""
    for _, _, child in linears(model):
        child.weight.data.copy_(rounded_to_bytes(child.weight, kind))


def mean_bytes(model: HybridForCausalLM) -> float:
    """Mean bytes of a weight that a decode pass reads, without parameters that are always fp32."""
    modules = (model.model.layers, model.model.norm, model.lm_head)
    read = [
        parameter
        for module in modules
        for name, parameter in module.named_parameters()
        if name.rpartition(".")[2] not in FLOAT32_PARAMETERS
    ]
    if all(parameter.dtype == model.dtype for parameter in read):
        return model.dtype.itemsize
    # scales are no weights, but bytes
    count = sum(each.numel() for each in read if each.dtype in (model.dtype, *TYPES.values()))
    return sum(each.nbytes for each in read) / count
