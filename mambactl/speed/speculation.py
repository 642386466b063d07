"""Speculative decoding at the points where plain decoding was measured."""

from collections.abc import Callable, Sequence
from functools import partial

from mambactl.decode.backend import Draft, K, make_engine, weight_bytes
from mambactl.decode.stats import DecodeStats
from mambactl.metrics import DECODE_RATE, DRAFTED_RATE, DRAFTED_TOKENS
from mambactl.models.draft_head import DraftHead
from mambactl.models.hybrid import HybridForCausalLM
from mambactl.speed.limits import Numbers, speculative_limit
from mambactl.speed.memory import release
from mambactl.speed.scripted_head import config_read
from mambactl.speed.subject import Grid, Subject, rounds_of, spread, sweep
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
    draft: Draft,
    k: K,
    grid: Grid,
    points: Sequence[Numbers],
) -> list[Numbers]:
    """The points of plain decoding with the same tokens decoded with `draft` added.

    `acceptance` is the share of judged tokens kept, `k` the number drafted (for "auto" most often),
    `speculative_byte_limit` the rate that bandwidth allows with these two.
    """

    def measure(length: int, rows: int, advance: Callable[[], None]) -> Numbers:
        prompts, share = subject.prompts(length, rows, grid), grid.same_prompt
        if subject.model.device.type == "cuda":
            release(subject.model.device)
        make = partial(make_engine, subject.model, draft, k, share=share, rounded=subject.rounded)
        engine, rounds = rounds_of(make, subject, prompts, grid, advance)
        runs = [each.stats for each in rounds]
        own = draft.body if isinstance(draft, DraftHead) else draft
        models = [each for each in (subject.model, own) if isinstance(each, HybridForCausalLM)]
        sizes = [weight_bytes(engine, each) for each in models]
        numbers = _numbers(subject, draft, k, runs, rows, grid.mean_context(length), sizes)
        return numbers | graph_numbers(engine, "speculative_")

    found = sweep(subject.label, grid, NUMBERS, measure)
    return [
        plain
        | numbers
        | {"speculative_speedup": _ratio(plain, numbers), "intervals": _both(plain, numbers)}
        for plain, numbers in zip(points, found, strict=True)
    ]


def _numbers(
    subject: Subject,
    draft: Draft,
    k: K,
    runs: Sequence[DecodeStats],
    rows: int,
    context: int,
    weight_sizes: Sequence[float],
) -> Numbers:
    total = DecodeStats()
    for run in runs:
        total.add(run)
    used = total.lengths.most_common(1)[0][0] if k == "auto" else k
    found = spread(speculative_tokens_per_second=[run.tokens_per_second for run in runs])
    model = subject.model
    other = draft.config if isinstance(draft, HybridForCausalLM) else None
    if isinstance(draft, DraftHead):
        other = config_read(draft)
    allowed = speculative_limit(
        model.config,
        other,
        used,
        total.acceptance_per_token,
        subject.bandwidth,
        weight_sizes[0],
        rows,
        context,
        kv_bytes=model.dtype.itemsize,
        draft_bytes_per_param=weight_sizes[-1],
    )
    return {
        "k": used,
        **found,
        "tokens_per_step": total.tokens_per_step,
        "acceptance": total.acceptance_per_token,
        "speculative_byte_limit": allowed,
        "speculative_share": found["speculative_tokens_per_second"] / allowed,
    }


def _both(plain: Numbers, numbers: Numbers) -> Numbers | None:
    found = {**(plain.get("intervals") or {}), **(numbers.get("intervals") or {})}
    return found or None


def _ratio(plain: Numbers, numbers: Numbers) -> float | None:
    """Gain of drafting; None where nothing was drafted, and both are plain decoding."""
    before, after = plain[DECODE_RATE.name], numbers[DRAFTED_RATE.name]
    return after / before if before and after and numbers[DRAFTED_TOKENS.name] else None
