"""Speculative decoding at the points where plain decoding was measured."""

import statistics
from collections.abc import Callable, Sequence

from mambactl.decode.backend import K, make_engine
from mambactl.decode.stats import DecodeStats
from mambactl.metrics import DECODE_RATE, DRAFTED_RATE
from mambactl.models.hybrid import HybridForCausalLM
from mambactl.speed.limits import speculative_limit
from mambactl.speed.subject import Grid, Numbers, Subject, decode, sweep
from mambactl.speed.throughput import graph_numbers

NUMBERS = (
    "k",
    "speculative_tokens_per_second",
    "tokens_per_step",
    "acceptance",
    "speculative_speedup",
    "speculative_byte_limit",
    "speculative_share",
)


def speculation(
    subject: Subject,
    draft: HybridForCausalLM | str,
    k: K,
    grid: Grid,
    points: Sequence[Numbers],
) -> list[Numbers]:
    """The points of plain decoding with the same tokens decoded with `draft` added.

    `acceptance` is the share of judged tokens kept, `k` the number drafted (for "auto" most often),
    `speculative_byte_limit` the rate that bandwidth allows with these two.
    """

    def measure(length: int, rows: int, advance: Callable[[], None]) -> Numbers:
        prompts = subject.prompts(length, rows, grid.seed)
        engine = make_engine(subject.model, draft, k, share=False)
        runs = decode(engine, subject, prompts, grid, advance)
        numbers = _numbers(subject, draft, k, runs, rows, grid.mean_context(length))
        return numbers | graph_numbers(engine, "speculative_")

    found = sweep(subject, grid, NUMBERS, measure)
    return [
        plain | numbers | {"speculative_speedup": _ratio(plain, numbers)}
        for plain, numbers in zip(points, found, strict=True)
    ]


def _numbers(
    subject: Subject,
    draft: HybridForCausalLM | str,
    k: K,
    runs: Sequence[DecodeStats],
    rows: int,
    context: int,
) -> Numbers:
    total = DecodeStats()
    for run in runs:
        total.add(run)
    used = total.lengths.most_common(1)[0][0] if k == "auto" else k
    rate = statistics.median(run.tokens_per_second for run in runs)
    model = subject.model
    other = draft.config if isinstance(draft, HybridForCausalLM) else None
    allowed = speculative_limit(
        model.config, other, used, total.acceptance_per_token, subject.bandwidth,
        model.dtype.itemsize, rows, context, model.dtype.itemsize,
    )  # fmt: skip
    return {
        "k": used,
        "speculative_tokens_per_second": rate,
        "tokens_per_step": total.tokens_per_step,
        "acceptance": total.acceptance_per_token,
        "speculative_byte_limit": allowed,
        "speculative_share": rate / allowed,
    }


def _ratio(plain: Numbers, numbers: Numbers) -> float | None:
    before, after = plain[DECODE_RATE.name], numbers[DRAFTED_RATE.name]
    return after / before if before and after else None
