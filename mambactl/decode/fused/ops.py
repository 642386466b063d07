"""All operations of a step on a GPU."""

from mambactl.kernels.triton.ops import TritonOps
from mambactl.kernels.triton.verdicts import TritonVerdicts


class DeviceOps(TritonOps, TritonVerdicts):
    """Passes and verdicts."""
