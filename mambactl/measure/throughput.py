"""Speed and memory of one model over context lengths and batch sizes, on random tokens."""

import ctypes
import re
import resource
import statistics
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from mambactl import console
from mambactl.decode.backend import make_engine
from mambactl.decode.prefill import prefill
from mambactl.decode.sampling import SamplingParams
from mambactl.decode.stats import DecodeStats
from mambactl.models.hybrid import HybridForCausalLM

Prompts = list[list[int]]
STATUS = Path("/proc/self/status")


def throughput(
    model: HybridForCausalLM,
    input_len: Sequence[int],
    batch_sizes: Sequence[int],
    output_len: int,
    warmup: int = 1,
    iters: int = 3,
    seed: int = 0,
    label: str = "bench",
) -> list[dict[str, Any]]:
    """Measure every pair of context length and batch size with greedy decoding.

    Rates are tokens per second of all rows together, medians over `iters`; reading the prompt is
    timed apart from decoding. `cache_bytes` is the cache after the prompt, `peak_bytes` the most
    memory in use at a time, weights included: of the device on CUDA, of the process elsewhere. A
    pair that does not fit a GPU has None in every column.
    """
    points = [(length, rows) for length in input_len for rows in batch_sizes]
    measured = []
    with console.progress(label, len(points) * (warmup + iters)) as progress:
        for length, rows in points:
            prompts = random_prompts(model.config.vocab_size, rows, length, seed)
            point = {"input_len": length, "batch_size": rows, "output_len": output_len}
            try:
                numbers = _measure(model, prompts, output_len, warmup, iters, progress)
            except torch.OutOfMemoryError:
                console.warn(f"{label}: {length} tokens x {rows} rows do not fit in memory")
                numbers = dict.fromkeys(NUMBERS)
            measured.append(point | numbers)
    return measured


NUMBERS = ("prefill_tokens_per_second", "decode_tokens_per_second", "cache_bytes", "peak_bytes")


def random_prompts(vocab_size: int, rows: int, length: int, seed: int) -> Prompts:
    """Token ids [rows][length], the same for every model with this vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab_size, (rows, length), generator=generator).tolist()


def _measure(
    model: HybridForCausalLM,
    prompts: Prompts,
    output_len: int,
    warmup: int,
    iters: int,
    progress: console.Task,
) -> dict[str, Any]:
    engine, params = make_engine(model, None, 0), SamplingParams(max_new_tokens=output_len)
    _reset_peak(model.device)
    runs: list[DecodeStats] = []
    for _ in range(warmup + iters):
        runs.append(engine.generate(prompts, params).stats)
        progress.advance(status=f"{len(prompts[0])} tokens x {len(prompts)} rows")
    runs = runs[warmup:]
    peak = _peak_bytes(model.device)
    # the engine keeps the last prompt token for the first decoding step
    read = len(prompts) * (len(prompts[0]) - 1)
    seconds = statistics.median(run.seconds["prefill"] for run in runs)
    with torch.no_grad():
        cache_bytes = prefill(model, prompts, recording=False).nbytes()
    decode = statistics.median(run.tokens_per_second for run in runs)
    values = (read / seconds if read else None, decode, cache_bytes, peak)
    return dict(zip(NUMBERS, values, strict=True))


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return
    # glibc keeps what loading and earlier models freed, and Linux the highest resident size ever:
    # both forget on request, and elsewhere the peak is that of the whole process
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # getrusage would remember what the process was before exec, and cannot be reset
    with suppress(OSError):
        found = re.search(r"^VmHWM:\s+(\d+) kB$", STATUS.read_text(), re.MULTILINE)
        if found:
            return int(found[1]) * 1024
    # Linux counts kibibytes, macOS bytes
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
