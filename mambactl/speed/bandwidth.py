"""The read-only bandwidth of a device, the ceiling that decoding is judged by."""

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

# CUDA: at most this much, and at most a quarter of what is free; the largest L2 is 0.1 GB
CUDA_GIGABYTES, CPU_GIGABYTES = 8.0, 0.25
# columns of the two-dimensional view, 64 KB of fp32
ROW = 1 << 14


def read_bandwidth(
    device: torch.device | str, gigabytes: float | None = None, repeats: int = 9
) -> float:
    """Bytes/s (1 GB = 1e9) at which `device` reads a buffer far larger than its caches.

    Sums fp32 numbers, which writes next to nothing: a read-only ceiling, a few % above what a copy
    reaches. The median over `repeats` sums, of the faster of two ways to sum (the whole buffer to
    one number, and row by row), since neither kernel is the faster one on every device.
    """
    device = torch.device(device)
    rate = _rate(device, _shape(device, gigabytes), repeats)
    if device.type == "cuda":
        # the models that come next need the memory whole
        torch.cuda.empty_cache()
    return rate


def _rate(device: torch.device, shape: tuple[int, int], repeats: int) -> float:
    buffer = torch.empty(shape, device=device, dtype=torch.float32)  # [rows, ROW]
    buffer.uniform_(generator=torch.Generator(device))
    measure = _cuda_seconds if device.type == "cuda" else _cpu_seconds
    ways = (buffer.sum, lambda: buffer.sum(1))
    return buffer.nbytes / min(_median(measure, way, device, repeats) for way in ways)


def _shape(device: torch.device, gigabytes: float | None) -> tuple[int, int]:
    """Rows and columns of the buffer."""
    size = 1e9 * (gigabytes or CPU_GIGABYTES)
    if device.type == "cuda":
        size = 1e9 * (gigabytes or CUDA_GIGABYTES)
        size = min(size, torch.cuda.mem_get_info(device)[0] / 4)
    return max(1, int(size) // (4 * ROW)), ROW


def _median(
    measure: Callable[[Callable[[], Tensor], torch.device], float],
    work: Callable[[], Tensor],
    device: torch.device,
    repeats: int,
) -> float:
    # the first sum also loads the kernel and wakes the clocks
    return statistics.median([measure(work, device) for _ in range(repeats + 1)][1:])


def _cuda_seconds(work: Callable[[], Tensor], device: torch.device) -> float:
    with torch.cuda.device(device):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000


def _cpu_seconds(work: Callable[[], Tensor], device: torch.device) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
