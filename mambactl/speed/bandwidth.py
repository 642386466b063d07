"""Memory bandwidth of a device, the ceiling of its decoding speed.

Decoding reads weights and writes next to nothing, so the ceiling is that of kernels which only
read. The fastest of several, and of several runs of each, counts: a slower one would put a decoder
that reads well beyond the limit.
"""

import importlib.util
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

# CUDA: at most this much, and at most a quarter of what is free; the largest L2 is 0.1 GB
CUDA_GIGABYTES, CPU_GIGABYTES = 8.0, 0.25
# so many buffers in rotation: when one is read again, nothing of it is left in a cache
BUFFERS = 4
# columns of the two-dimensional view, 64 KB of fp32
ROW = 1 << 14
# programs of the kernel on each multiprocessor
PROGRAMS = 16

# reads one buffer [rows, ROW] and returns the bytes read
Way = Callable[[Tensor], int]


def read_bandwidth(
    device: torch.device | str, gigabytes: float | None = None, repeats: int = 9
) -> float:
    """Bytes/s (1 GB = 1e9) at which `device` reads buffers far larger than its caches.

    The best of `repeats` runs of each way to sum fp32 numbers: whole buffers, row by row, and on
    CUDA with Triton a kernel of several shapes. On CUDA a run is a captured graph that reads all
    buffers in turn, so that no launch is part of the time.
    """
    device = torch.device(device)
    buffers = _buffers(device, gigabytes)
    measure = _cuda_rate if device.type == "cuda" else _cpu_rate
    rate = max(measure(way, buffers, repeats) for way in _ways(device))
    del buffers
    if device.type == "cuda":
        # the models that come next need the memory whole
        torch.cuda.empty_cache()
    return rate


def _buffers(device: torch.device, gigabytes: float | None) -> list[Tensor]:
    """Random numbers [rows, ROW] fp32; a CPU, whose caches hold a tenth of it, has one."""
    size, count = 1e9 * (gigabytes or CPU_GIGABYTES), 1
    if device.type == "cuda":
        size, count = 1e9 * (gigabytes or CUDA_GIGABYTES), BUFFERS
        size = min(size, torch.cuda.mem_get_info(device)[0] / 4)
    rows = max(1, int(size / count) // (4 * ROW))
    generator = torch.Generator(device)
    return [
        torch.empty(rows, ROW, device=device).uniform_(generator=generator) for _ in range(count)
    ]


def _ways(device: torch.device) -> Sequence[Way]:
    found: list[Way] = [_sum_all, _sum_rows]
    if device.type == "cuda" and importlib.util.find_spec("triton"):
        from mambactl.kernels.streaming import SHAPES, read

        count = torch.cuda.get_device_properties(device).multi_processor_count * PROGRAMS
        sums = torch.empty(count, device=device)
        found += [partial(_stream, read, sums, *shape) for shape in SHAPES]
    return found


def _sum_all(buffer: Tensor) -> int:
    buffer.sum()
    return buffer.nbytes


def _sum_rows(buffer: Tensor) -> int:
    buffer.sum(1)
    return buffer.nbytes


def _stream(
    read: Callable[[Tensor, Tensor, int, int], int],
    sums: Tensor,
    block: int,
    warps: int,
    buffer: Tensor,
) -> int:
    return read(buffer.view(-1), sums, block, warps) * buffer.element_size()


def _cuda_rate(way: Way, buffers: Sequence[Tensor], repeats: int) -> float:
    with torch.cuda.device(buffers[0].device):
        # compiles and wakes the clocks
        bytes_read = sum(way(buffer) for buffer in buffers)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for buffer in buffers:
                way(buffer)
        best = min(_replay_seconds(graph) for _ in range(repeats + 1))
        # what capturing kept goes with the graph
        del graph
    return bytes_read / best


def _replay_seconds(graph: torch.cuda.CUDAGraph) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def _cpu_rate(way: Way, buffers: Sequence[Tensor], repeats: int) -> float:
    (buffer,) = buffers
    seconds, bytes_read = [], 0
    for _ in range(repeats + 1):
        start = time.perf_counter()
        bytes_read = way(buffer)
        seconds.append(time.perf_counter() - start)
    return bytes_read / min(seconds)
