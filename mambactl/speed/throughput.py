"""Speed and memory of one model over context lengths and batch sizes, decoding plainly."""

import statistics
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from mambactl.decode.backend import make_engine, weight_bytes
from mambactl.decode.engine import Engine
from mambactl.models.cache_bytes import bytes_behind
from mambactl.speed.limits import Numbers, limit
from mambactl.speed.memory import peak_bytes, release, reset_peak
from mambactl.speed.subject import Grid, Subject, rounds_of, spread, sweep

if TYPE_CHECKING:
    from mambactl.decode.gpu.fused_engine import FusedEngine

# numbers that prompts read together do not have
OF_PROMPTS = ("prefill_tokens_per_second", "first_token_ms")
NUMBERS = (
    *OF_PROMPTS,
    "decode_tokens_per_second",
    "decode_byte_limit",
    "decode_share",
    "cache_bytes",
    "peak_bytes",
    "intervals",
)


def throughput(subject: Subject, grid: Grid) -> list[Numbers]:
    """Measure every point with greedy decoding.

    Rates are tokens per second of all rows together, medians over the rounds; reading the prompt is
    timed apart from decoding. `first_token_ms` are milliseconds from the call to its first token,
    of all rows; `intervals` are the smallest and the largest of the rounds. `decode_byte_limit` is
    the rate that bandwidth allows and `decode_share` what is reached of it. `cache_bytes` is the
    cache after the prompt, `peak_bytes` the most memory in use at a time, weights included: of the
    device on CUDA, of the process elsewhere. A pair that does not fit a GPU has None in every
    column, and rows of the same prompt have it for the prompt's speed.
    """

    def measure(length: int, rows: int, advance: Callable[[], None]) -> Numbers:
        return _measure(subject, grid, length, rows, advance)

    numbers = sweep(subject.label, grid, NUMBERS, measure)
    return [
        {"input_len": length, "batch_size": rows, "output_len": grid.output_len} | found
        for (length, rows), found in zip(grid.points, numbers, strict=True)
    ]


def _measure(
    subject: Subject, grid: Grid, length: int, rows: int, advance: Callable[[], None]
) -> Numbers:
    model = subject.model
    prompts, share = subject.prompts(length, rows, grid), grid.same_prompt
    if model.device.type == "cuda":
        # the point before has objects that refer to each other, and to its memory
        release(model.device)
    reset_peak(model.device)
    make = partial(make_engine, model, None, 0, share=share, rounded=subject.rounded)
    engine, rounds = rounds_of(make, subject, prompts, grid, advance)
    runs = [each.stats for each in rounds]
    peak = peak_bytes(model.device)
    rates = {"decode_tokens_per_second": [run.tokens_per_second for run in runs]}
    prompt: Numbers = dict.fromkeys(OF_PROMPTS)
    if not share:
        rates["first_token_ms"] = [1000 * each.first_token for each in rounds]
        seconds = statistics.median(run.seconds["prefill"] for run in runs)
        prompt["prefill_tokens_per_second"] = rows * length / seconds
    found = prompt | spread(**rates)
    context, kv_bytes = grid.mean_context(length), model.dtype.itemsize
    size = weight_bytes(engine, model)
    allowed = limit(model.config, subject.bandwidth, size, rows, context, kv_bytes)
    found |= {
        "decode_byte_limit": allowed,
        "decode_share": found["decode_tokens_per_second"] / allowed,
        "cache_bytes": rows * bytes_behind(model.config, kv_bytes, length),
        "peak_bytes": peak,
    }
    return {name: found[name] for name in NUMBERS} | graph_numbers(engine)


def graph_numbers(engine: "Engine | FusedEngine", prefix: str = "") -> Numbers:
    """Seconds for starting and capturing steps; empty for an engine without graphs."""
    if isinstance(engine, Engine):
        return {}
    (session,) = engine.sessions.values()
    captured = session.capture
    if not captured.graphs:
        return {}
    return {
        # a step is one graph by construction: drafts, verdict and mailbox are inside
        f"{prefix}launches_per_step": 1,
        f"{prefix}captures": captured.graphs,
        f"{prefix}capture_seconds": captured.capture_seconds,
    }
