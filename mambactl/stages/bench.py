"""`bench`: prefill and decode speed, memory and cache of a model, alone or against another."""

import gc
from typing import Any

import torch

from mambactl import console
from mambactl.checkpoint.load import load_model
from mambactl.checkpoint.summary import describe
from mambactl.errors import CheckError, ModelError, UsageError
from mambactl.measure.throughput import throughput
from mambactl.models.hybrid import HybridForCausalLM
from mambactl.recipe import BenchConfig
from mambactl.stages import StageResult
from mambactl.stages.placement import place
from mambactl.stages.results import save_results
from mambactl.stages.teacher import teacher_of

STAGE = "bench"

# column of a measurement -> the ratio it gives, larger is better for the model
RATIOS = {
    "prefill_tokens_per_second": "prefill_speedup",
    "decode_tokens_per_second": "decode_speedup",
    "cache_bytes": "cache_reduction",
}

Points = list[dict[str, Any]]


def run(config: BenchConfig, source: str) -> StageResult:
    """Measure every context length and batch size; CheckError below `min_speedup`."""
    baseline = _baseline(config, source)
    device, dtype = place(config)
    points = _measure(config, source, device, dtype)
    metrics: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "dtype": str(dtype).removeprefix("torch."),
        "points": points,
    }
    if baseline is not None:
        other = _measure(config, baseline, device, dtype)
        metrics |= {"baseline": baseline, "baseline_points": other}
        metrics["points"] = compare(points, other)
    _show(source, metrics)
    save_results(STAGE, source, device.type, config, metrics)
    _check(config, metrics["points"])
    return StageResult(path=source, metrics=metrics)


def plan(config: BenchConfig, source: str) -> dict[str, Any]:
    """What would be measured; reads headers only."""
    baseline = _baseline(config, source)
    device, dtype = place(config)
    found = describe(source)
    other = describe(baseline) if baseline else None
    return {
        "source": found["checkpoint"],
        "parameters": found["parameters"],
        "mixers": found["mixers"],
        "baseline": other and other["checkpoint"],
        "baseline_parameters": other and other["parameters"],
        "input_len": config.input_len,
        "batch_sizes": config.batch_size,
        "output_len": config.output_len,
        "cache_bytes_at_most": _cache_bytes(config, found["cache"]),
        "device": str(device),
        "dtype": str(dtype).removeprefix("torch."),
    }


def compare(points: Points, baseline: Points) -> Points:
    """Add to every point how much better it is than the baseline's; None where one is missing."""
    return [
        point | {ratio: _ratio(point, other, column) for column, ratio in RATIOS.items()}
        for point, other in zip(points, baseline, strict=True)
    ]


def _ratio(point: dict[str, Any], other: dict[str, Any], column: str) -> float | None:
    mine, theirs = point[column], other[column]
    if not mine or not theirs:
        return None
    return theirs / mine if column == "cache_bytes" else mine / theirs


def _baseline(config: BenchConfig, source: str) -> str | None:
    if config.min_speedup is not None and config.baseline is None:
        raise UsageError(
            "--min-speedup needs something to be faster than",
            hint="pass --baseline teacher, or --baseline MODEL",
        )
    return (
        teacher_of(source, None, "--baseline")
        if config.baseline == "teacher"
        else (config.baseline)
    )


def _measure(config: BenchConfig, spec: str, device: torch.device, dtype: torch.dtype) -> Points:
    model = load_model(
        spec, device=str(device), dtype=dtype, trust_remote_code=config.trust_remote_code
    )
    if not isinstance(model, HybridForCausalLM):
        raise ModelError(
            f"{spec} runs code of its own, which the decode engine cannot drive",
            hint="bench a checkpoint that loads without --trust-remote-code",
        )
    points = throughput(
        model,
        config.input_len,
        config.batch_size,
        config.output_len,
        config.warmup,
        config.iters,
        config.seed,
        label=spec,
    )
    # the next model's peak must not hold this one
    del model
    gc.collect()
    return points


def _cache_bytes(config: BenchConfig, cache: dict[str, int]) -> int:
    tokens = max(config.input_len) + config.output_len
    per_row = cache["bytes_per_sequence"] + tokens * cache["bytes_per_token"]
    return max(config.batch_size) * per_row


def _show(source: str, metrics: dict[str, Any]) -> None:
    title = f"{source} on {metrics['device']} in {metrics['dtype']}"
    columns = ("context x rows", "", "prefill tok/s", "decode tok/s", "cache MiB", "peak MiB")
    others: Points = metrics.get("baseline_points", [])
    if others:
        title += f", against {metrics['baseline']}"
    lines = []
    for index, point in enumerate(metrics["points"]):
        lines.append((_name(point), "model" if others else "", *_cells(point)))
        if others:
            lines.append(("", "baseline", *_cells(others[index])))
            lines.append(("", "gain", *(_times(point[ratio]) for ratio in RATIOS.values()), ""))
    console.table(title, columns, lines)


def _name(point: dict[str, Any]) -> str:
    return f"{point['input_len']} x {point['batch_size']}"


def _cells(point: dict[str, Any]) -> list[str]:
    rates = [point["prefill_tokens_per_second"], point["decode_tokens_per_second"]]
    sizes = [point["cache_bytes"], point["peak_bytes"]]
    return [
        *("-" if rate is None else f"{rate:,.1f}" for rate in rates),
        *("-" if size is None else f"{size / 2**20:,.2f}" for size in sizes),
    ]


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}x"


def _check(config: BenchConfig, points: Points) -> None:
    if config.min_speedup is None:
        return
    slow = [
        f"{_name(point)}: {_times(point['decode_speedup'])}"
        for point in points
        if not _fast_enough(point, config.min_speedup)
    ]
    if slow:
        raise CheckError(
            f"the decode speed-up is below {config.min_speedup:g} at {', '.join(slow)}"
        )


def _fast_enough(point: dict[str, Any], bound: float) -> bool:
    if point["decode_tokens_per_second"] is None:
        return False
    # a baseline that did not fit cannot be faster
    return point["decode_speedup"] is None or point["decode_speedup"] >= bound
