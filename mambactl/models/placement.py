"""Which device a stage runs on and which type its weights have there."""

import torch

from mambactl.errors import ResourceError, UsageError
from mambactl.options import StageConfig
from mambactl.ranks import local_rank, processes


def place(config: StageConfig) -> tuple[torch.device, torch.dtype]:
    """Resolve `device` and `dtype`; auto is the GPU, and bfloat16 where a GPU computes in it.

    Raises UsageError for an unknown device and for fp64 on a GPU, ResourceError for a device that
    this machine has not.
    """
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if processes() > 1 and device is not None:
        device = _of_this_process(device)
    if device is None or device.type not in ("cpu", "cuda"):
        raise UsageError(f"unknown device {name!r}", "use cpu, cuda, cuda:1 or auto")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ResourceError(f"there is no {device} here", "use --device cpu, or `mambactl doctor`")
    if config.dtype == "float64" and device.type != "cpu":
        raise UsageError("the GPU's kernels compute no float64", "add --device cpu")
    if config.dtype != "auto":
        return device, getattr(torch, config.dtype)
    capable = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return device, torch.bfloat16 if capable else torch.float32


def _of_this_process(device: torch.device) -> torch.device:
    """The GPU of one of several processes of a run, the current one from now on."""
    if device.type != "cuda":
        return device
    if device.index is not None:
        raise UsageError(f"{processes()} processes cannot share {device}", "use --device cuda")
    if local_rank() < torch.cuda.device_count():
        torch.cuda.set_device(local_rank())
    return torch.device("cuda", local_rank())
