"""Capture of CUDA graphs, and copies from the host, that steps under way do not wait for."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")


def captured(
    run: Callable[[], Result],
    device: torch.device,
    pool: "torch.cuda._POOL_HANDLE | None" = None,
) -> tuple[torch.cuda.CUDAGraph, Result]:
    """The graph of what `run` launches, and what it returns, which lies in the graph's memory.

    Nothing that it launches may be compiled on the way.
    """
    # a thread's first product makes a handle, which a capture does not allow
    torch.cuda.current_blas_handle()
    graph, aside = torch.cuda.CUDAGraph(), torch.cuda.Stream(device)
    here = torch.cuda.current_stream(device)
    aside.wait_stream(here)
    pools = () if pool is None else (pool,)
    # `torch.cuda.graph` collects garbage and waits for the device first: answers under way
    # would stop for longer than a prompt takes
    with torch.cuda.stream(aside):
        graph.capture_begin(*pools, capture_error_mode="thread_local")
        try:
            result = run()
        finally:
            graph.capture_end()
    here.wait_stream(aside)
    return graph, result


def overwrite(tensor: Tensor, host: Tensor) -> None:
    """Copy a tensor of the host over one of a device, in the order of the device's stream."""
    # memory that is not pinned would be waited for, with all steps under way
    tensor.copy_(host.pin_memory() if tensor.is_cuda else host, non_blocking=True)


def sent(host: Tensor, device: torch.device) -> Tensor:
    """A copy of a tensor of the host on a device."""
    tensor = torch.empty_like(host, device=device)
    overwrite(tensor, host)
    return tensor
