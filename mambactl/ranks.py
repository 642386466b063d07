"""Processes of one run, as torchrun and `accelerate launch` number them, and the device of each.

Children of any process get their environment here.
Collectives are no-ops in a single process; torch is imported where it is first needed.
"""

import os
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import count
from typing import TYPE_CHECKING, TypeVar

from mambactl.errors import ResourceError, UsageError
from mambactl.present import present

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch._C._distributed_c10d import Store

    from mambactl.options import StageConfig

T = TypeVar("T")

# a folder where the processes that `--nproc` started leave word of how they failed
REPORTS = "_MAMBACTL_REPORTS"
# chunks of a scan, and chances of tokens, are added up in it
NO_MPS = "MPS computes no float64, which the kernels sum in"
_NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
# of the stores that were asked for
_NUMBERS = count()


def child_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment for a child that runs Python, and `extra`.

    Modules are never taken from the current folder, by the child or by what it starts: a yaml.py
    that lies among downloaded data must not run. PYTHONPATH and installed packages stay.
    """
    return {**os.environ, **(extra or {}), "PYTHONSAFEPATH": "1"}


def launched() -> bool:
    """True if this process was started as one of a run's processes."""
    return all(os.environ.get(name, "").isdecimal() for name in _NAMES)


def processes() -> int:
    """Number of processes in the run, on all machines."""
    return int(os.environ["WORLD_SIZE"]) if launched() else 1


def rank() -> int:
    """Rank of this process in the run, from 0."""
    return int(os.environ["RANK"]) if launched() else 0


def local_rank() -> int:
    """Rank of this process on its machine, which is the number of its GPU."""
    return int(os.environ["LOCAL_RANK"]) if launched() else 0


def is_main() -> bool:
    """True if this process writes, prints and answers for the others."""
    return rank() == 0


def sharded() -> bool:
    """True if weights, gradients and optimiser state are split over the processes."""
    return launched() and os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"


def join(device: "torch.device") -> None:
    """Initialise the process group (NCCL for CUDA, Gloo for CPU)."""
    import torch

    if processes() > 1 and not torch.distributed.is_initialized():
        cuda = device.type == "cuda"
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        torch.distributed.init_process_group(backend, device_id=device if cuda else None)


def store() -> "Store":
    """A new store of keys and numbers that the processes share; each asks for as many of them.

    The main process holds it: without that one, the others' calls fail.
    """
    # where types are declared, too
    from torch._C._distributed_c10d import PrefixStore

    return PrefixStore(f"mambactl-{next(_NUMBERS)}", _whole_store())


@cache
def _whole_store() -> "Store":
    from torch.distributed.rendezvous import rendezvous

    found, _, _ = next(rendezvous("env://"))
    return found


def add_up(tensors: Sequence["Tensor"]) -> None:
    """Replace tensors by their sums over all processes, all of them at once."""
    import torch

    if processes() == 1:
        return
    for work in [torch.distributed.all_reduce(tensor, async_op=True) for tensor in tensors]:
        present(work).wait()


def total(value: "Tensor") -> "Tensor":
    """The sum of a tensor over all processes."""
    found = value.detach().clone()
    add_up([found])
    return found


def largest(value: int, device: "torch.device | str" = "cpu") -> int:
    """The largest of every process's numbers."""
    import torch

    if processes() == 1:
        return value
    shared = torch.tensor(value, device=device)
    torch.distributed.all_reduce(shared, torch.distributed.ReduceOp.MAX)
    return int(shared)


def from_main(value: T) -> T:
    """The value of the main process, on every process."""
    import torch

    if processes() == 1:
        return value
    shared = [value]
    torch.distributed.broadcast_object_list(shared)
    return shared[0]


def leave() -> None:
    """Destroy the process group."""
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def placement(config: "StageConfig") -> "tuple[torch.device, torch.dtype]":
    """Resolve `device` and `dtype`; auto is the GPU, and bfloat16 where a GPU computes in it.

    Raises UsageError for an unknown device and for fp64 on a GPU, ResourceError for a device that
    this machine has not.
    """
    import torch

    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if processes() > 1 and device is not None:
        device = _of_this_process(device)
    if device is not None and device.type == "mps":
        raise UsageError(f"--device {name}: {NO_MPS}", "use --device cpu")
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


def _of_this_process(device: "torch.device") -> "torch.device":
    """The GPU of one of several processes of a run, the current one from now on."""
    import torch

    if device.type != "cuda":
        return device
    if device.index is not None:
        raise UsageError(f"{processes()} processes cannot share {device}", "use --device cuda")
    if local_rank() < torch.cuda.device_count():
        torch.cuda.set_device(local_rank())
    return torch.device("cuda", local_rank())
