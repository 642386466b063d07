"""All operations of a step on a GPU."""

from torch import nn

from mambactl.kernels.decode.triton.ops import TritonOps
from mambactl.kernels.decode.triton.verdicts import TritonVerdicts


class DeviceOps(TritonOps, TritonVerdicts):
    """Passes and verdicts."""


def device_ops(model: nn.Module, exact: bool = False) -> DeviceOps:
    """The operations for a model's device and weights."""
    weight = next(model.parameters())
    return DeviceOps(exact, weight.device, weight.element_size())
