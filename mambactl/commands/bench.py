"""`bench`: prefill and decode speed, memory and cache of models, alone, drafted for or compared."""

from operator import truediv

import torch

from mambactl.checkpoint.load import open_checkpoint
from mambactl.checkpoint.teacher import teacher_of
from mambactl.errors import CheckError
from mambactl.generation import decoding
from mambactl.json_values import JsonObject
from mambactl.metrics import CACHE, DECODE_GAIN, DECODE_RATE, FIRST_TOKEN, PREFILL_RATE, Metric
from mambactl.models.byte_weights import require_weights
from mambactl.models.config import HybridConfig
from mambactl.options import BenchConfig
from mambactl.options.measurement import TRANSFORMERS
from mambactl.ranks import placement
from mambactl.report.results import save_results
from mambactl.speed import bench_tables, candidates
from mambactl.speed.candidates import Source
from mambactl.speed.conditions import conditions, measured_again
from mambactl.speed.memory import release
from mambactl.speed.shape_table import require_shapes
from mambactl.speed.shapes import SHAPES
from mambactl.speed.speculation import speculation
from mambactl.speed.subject import Grid, Subject
from mambactl.speed.throughput import throughput
from mambactl.speed.training_bench import TEACHER_TEXT, TEXT, require_hybrids, training_points
from mambactl.speed.transformers_baseline import llama_shape, transformers_points
from mambactl.stage_result import StageResult

STAGE = "bench"

# numbers with a gain over the baseline's, larger is better for the model
COMPARED = (PREFILL_RATE, FIRST_TOKEN, DECODE_RATE, CACHE)

Points = list[JsonObject]


def run(config: BenchConfig, source: str | None) -> StageResult:
    """Measure every context length and batch size; CheckError below `min_speedup`."""
    result = measure(config, source)
    check(config, result.metrics)
    return result


def measure(config: BenchConfig, source: str | None) -> StageResult:
    """Measure, print tables and keep the numbers, whatever they are."""
    baseline = _prepare(config, source)
    device, dtype = placement(config)
    require_weights(config.weights, device)
    metrics = conditions(config, device, dtype)
    if config.training:
        return _training(config, source, metrics, device, dtype)
    if source is None:
        return _synthetic(config, metrics, device, dtype)
    return _checkpoint(config, source, baseline, metrics, device, dtype)


def plan(config: BenchConfig, source: str | None) -> JsonObject:
    """Describe the measurements; reads headers only."""
    baseline = _prepare(config, source)
    device, dtype = placement(config)
    require_weights(config.weights, device)
    where = {
        "device": str(device),
        "dtype": str(dtype).removeprefix("torch."),
        "weights": config.weights,
    }
    if config.training:
        about = candidates.about_shapes(config) if source is None else {"source": source}
        rows = {"input_len": config.input_len, "batch_sizes": config.batch_size}
        return {"training": True, **about, **rows, **where}
    sizes = {
        "draft": config.draft,
        "k": config.k if config.draft else 0,
        "input_len": config.input_len,
        "batch_sizes": config.batch_size,
        "output_len": config.output_len,
    }
    if source is None:
        return candidates.about_shapes(config) | sizes | where
    found = candidates.about_checkpoint(source)
    named = baseline not in (None, TRANSFORMERS)
    other = candidates.about_checkpoint(baseline) if named else None
    return {
        "source": found["checkpoint"],
        "parameters": found["parameters"],
        "mixers": found["mixers"],
        "baseline": other["checkpoint"] if other else baseline,
        "baseline_parameters": other and other["parameters"],
        **sizes,
        "cache_bytes_at_most": _cache_bytes(config, found["cache"]),
        **where,
    }


def compare(points: Points, baseline: Points) -> Points:
    """Add to every point how much better it is than the baseline's; None where one is missing."""
    return [
        point | {each.gain: _gain(point, other, each) for each in COMPARED}
        for point, other in zip(points, baseline, strict=True)
    ]


def _gain(point: JsonObject, other: JsonObject, metric: Metric) -> float | None:
    mine, theirs = point.get(metric.name), other.get(metric.name)
    if not mine or not theirs:
        return None
    return theirs / mine if metric.better == "lower" else mine / theirs


def _prepare(config: BenchConfig, source: str | None) -> str | None:
    """Refuse what contradicts itself; returns the baseline."""
    config.require_coherent()
    if source is None:
        require_shapes(config.shapes)
        if config.baseline is not None:
            for name in config.synthetic:
                llama_shape(SHAPES[name](), name)
        if config.training:
            require_hybrids(config)
        return config.baseline
    baseline = config.baseline
    if baseline == "teacher":
        baseline = teacher_of(source, None, "--baseline", config.trust_remote_code)
    # headers alone: a model that is not there shows before seconds of measuring the memory
    for spec in (source, baseline):
        if spec in (None, TRANSFORMERS):
            continue
        open_checkpoint(spec).close()
    decoding.require_draft(config, source)
    return baseline


def _checkpoint(
    config: BenchConfig,
    source: str,
    baseline: str | None,
    metrics: JsonObject,
    device: torch.device,
    dtype: torch.dtype,
) -> StageResult:
    own = candidates.checkpoint(config, source, device, dtype, config.draft)
    metrics["points"], shape = _measure(config, own, metrics, device)
    others: Points = []
    if baseline == TRANSFORMERS:
        others = _of_transformers(config, source, shape, device, dtype)
    elif baseline is not None:
        plain = candidates.checkpoint(config, baseline, device, dtype, None)
        others, _ = _measure(config, plain, metrics, device)
    if baseline is not None:
        metrics |= {"baseline": baseline, "baseline_points": others}
        metrics["points"] = compare(metrics["points"], others)
    measured_again(metrics, device, [*metrics["points"], *others])
    bench_tables.show(source, metrics)
    stored = "" if config.weights == "auto" else f"-{config.weights}"
    kept = save_results(STAGE, source, f"{device.type}{stored}", config, metrics)
    return StageResult(path=source, metrics=metrics, kept=kept)


def _synthetic(
    config: BenchConfig, metrics: JsonObject, device: torch.device, dtype: torch.dtype
) -> StageResult:
    found: dict[str, tuple[Points, Points]] = {}
    # hybrids of one Llama share its points
    llamas: dict[str, Points] = {}
    for name in config.synthetic:
        source = candidates.synthetic(config, name, device, dtype)
        points, shape = _measure(config, source, metrics, device)
        others: Points = []
        if config.baseline == TRANSFORMERS:
            key = llama_shape(shape, name).to_json_string()
            llamas[key] = llamas.get(key) or _of_transformers(config, name, shape, device, dtype)
            others = llamas[key]
            points = compare(points, others)
        found[name] = points, others
    metrics["points"] = [point for points, _ in found.values() for point in points]
    measured_again(metrics, device, metrics["points"])
    if config.baseline is not None:
        every = [point for others in llamas.values() for point in others]
        metrics |= {"baseline": config.baseline, "baseline_points": every}
    for name, (points, others) in found.items():
        bench_tables.show(name, metrics | {"points": points, "baseline_points": others})
    return StageResult(None, metrics, ",".join(config.synthetic))


def _training(
    config: BenchConfig,
    source: str | None,
    metrics: JsonObject,
    device: torch.device,
    dtype: torch.dtype,
) -> StageResult:
    metrics["points"] = training_points(config, source, device, dtype)
    bench_tables.show_training(metrics)
    parts = [
        f"{point['stage']} {point['tokens_per_second']:,.0f} tokens/s"
        for point in metrics["points"]
    ]
    if config.baseline is not None:
        ours, theirs = (
            [point["tokens_per_second"] for point in metrics["points"] if point["stage"] == stage]
            for stage in (TEXT, TEACHER_TEXT)
        )
        metrics["training_speedup"] = min(map(truediv, ours, theirs))
        parts.append(f"text at {metrics['training_speedup']:.2f}x its teacher's speed or more")
    return StageResult(source, metrics, ", ".join(parts))


def measure_points(config: BenchConfig, source: Source, subject: Subject, grid: Grid) -> Points:
    """Plain decoding of a model at every point, and decoding with the draft of its source."""
    points = throughput(subject, grid)
    if source.draft is not None:
        points = speculation(subject, source.draft(subject.model), config.k, grid, points)
    return [{"model": source.name, **point} for point in points]


def _measure(
    config: BenchConfig, source: Source, metrics: JsonObject, device: torch.device
) -> tuple[Points, HybridConfig]:
    """The points of a model, whose memory is free again, and its configuration."""
    bandwidth, grid = metrics["bandwidth_bytes_per_second"], Grid.of(config)
    subject = source.subject(bandwidth, rounded=config.dtype == "auto")
    shape = subject.model.config
    decoding.warn_beyond_positions(shape, max(grid.input_len) + grid.output_len, source.name)
    points = measure_points(config, source, subject, grid)
    del subject
    release(device)
    return points, shape


def _of_transformers(
    config: BenchConfig, name: str, shape: HybridConfig, device: torch.device, dtype: torch.dtype
) -> Points:
    """The points of transformers' own Llama of a model's shape."""
    grid = Grid.of(config)
    return transformers_points(llama_shape(shape, name), name, grid, device, dtype)


def _cache_bytes(config: BenchConfig, cache: dict[str, int]) -> int:
    tokens = max(config.input_len) + config.output_len
    per_row = cache["bytes_per_sequence"] + tokens * cache["bytes_per_token"]
    return max(config.batch_size) * per_row


def check(config: BenchConfig, metrics: JsonObject) -> None:
    """Raise CheckError where the model is not faster than the baseline by `min_speedup`."""
    if config.min_speedup is None:
        return
    points: Points = metrics["points"]
    slow = [
        f"{bench_tables.name(point)}: {DECODE_GAIN.shown(point)}"
        for point in points
        if not _fast_enough(point, config.min_speedup)
    ]
    if slow:
        raise CheckError(
            f"the decode speed-up is below {config.min_speedup:g} at {', '.join(slow)}"
        )


def _fast_enough(point: JsonObject, bound: float) -> bool:
    if point[DECODE_RATE.name] is None:
        return False
    # a baseline that did not fit cannot be faster
    gain = point[DECODE_GAIN.name]
    return gain is None or gain >= bound
