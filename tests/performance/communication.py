"""Share of training steps in which GPUs exchange tensors, as torch's profiler sees one process.

A kernel of NCCL runs from the moment its own process arrives, so waiting for the others counts, and
so does what runs beside products. `alone` is the part with no other kernel beside it: time that
more bandwidth, or processes that wait less for each other, could save.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch.profiler import ProfilerActivity, profile

from mambactl.present import present

Span = tuple[float, float]
NO_GPU = "not measured: on a CPU no kernels of NCCL run, which are what is counted"
NO_KERNELS = "not measured: the profiler reported no kernels"


def communication(
    take: Callable[[], object], steps: int, device: torch.device
) -> dict[str, object]:
    """Shares of the time of some steps, of this process; `take` takes one and is always called.

    `busy`: a kernel of NCCL ran. `alone`: nothing else ran meanwhile. `idle`: no kernel ran. What
    is not measured has `why` alone.
    """
    if device.type != "cuda":
        for _ in range(steps):
            take()
        return {"why": NO_GPU}
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(steps):
            take()
        torch.cuda.synchronize(device)
    kernels = [
        (each.name, (each.time_range.start, each.time_range.end))
        for each in present(seen.events())
        if each.device_type == torch.autograd.DeviceType.CUDA and not each.is_user_annotation
    ]
    return {"steps": steps, **shares(kernels)} if kernels else {"why": NO_KERNELS}


def shares(kernels: Iterable[tuple[str, Span]]) -> dict[str, float]:
    """Shares `busy`, `alone` and `idle` of the time from the first kernel to the last one's end.

    Each kernel is its name and when it began and ended; those with nccl in their names communicate.
    """
    found = list(kernels)
    talk = union(span for name, span in found if "nccl" in name.lower())
    work = union(span for name, span in found if "nccl" not in name.lower())
    every = union(span for _, span in found)
    whole = every[-1][1] - every[0][0]
    busy, either = length(talk), length(every)
    return {
        "busy": round(busy / whole, 4),
        "alone": round((either - length(work)) / whole, 4),
        "idle": round(1 - either / whole, 4),
    }


def union(spans: Iterable[Span]) -> list[Span]:
    """Spans without overlaps, in order, that cover what the given ones cover."""
    found: list[Span] = []
    for start, end in sorted(spans):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        else:
            found.append((start, end))
    return found


def length(spans: Sequence[Span]) -> float:
    """Sum of the lengths of spans that do not overlap."""
    return sum(end - start for start, end in spans)
