"""Every measured number: heading, unit, format and direction, once.

Whatever computes a number keeps it under its `name`; console tables, Markdown, pages, comparisons
and bounds read here how to show it. `METRICS` is by group, each group in the order in which its
numbers are computed. One object stands in every group that has the same number.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from mambactl.json_values import JsonObject

Format = Callable[[Any], str]
# results by the name of a metric, or of a part with numbers of its own
Numbers = JsonObject
Better = Literal["higher", "lower"]


def exact(value: float) -> str:
    """Write a value with four decimals."""
    return f"{value:.4f}"


def signed(value: float) -> str:
    """Write a difference with its sign and four decimals."""
    return f"{value:+.4f}"


def number(value: float) -> str:
    """Write a value with four decimals, one from a hundred on."""
    return f"{value:.4f}" if abs(value) < 100 else f"{value:,.1f}"


def percent(value: float) -> str:
    """Write a fraction in percent with one decimal."""
    return f"{100 * value:.1f} %"


def whole_percent(value: float) -> str:
    """Write a fraction in percent without decimals."""
    return f"{100 * value:.0f} %"


def tight_percent(value: float) -> str:
    """Write a fraction in percent without decimals or a space."""
    return f"{value:.0%}"


def ratio(value: float) -> str:
    """Write a factor with three decimals, none from a hundred on."""
    return f"{value:.3f}" if abs(value) < 100 else f"{value:,.0f}"


def times(value: float) -> str:
    """Write a factor over a baseline."""
    return f"{value:.2f}x"


def mebibytes(value: float) -> str:
    """Write bytes as MiB."""
    return f"{value / 2**20:,.2f}"


def count(value: int) -> str:
    """Write a whole number."""
    return f"{value:,}"


def whole(value: float) -> str:
    """Write a value without decimals, thousands grouped."""
    return f"{value:,.0f}"


def tenths(value: float) -> str:
    """Write a value with one decimal."""
    return f"{value:.1f}"


def grouped_tenths(value: float) -> str:
    """Write a value with one decimal, thousands grouped."""
    return f"{value:,.1f}"


def hundredths(value: float) -> str:
    """Write a value with two decimals."""
    return f"{value:.2f}"


def rate(value: float) -> str:
    """Write a rate with one decimal, none from a hundred on."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def significant(value: float) -> str:
    """Write a value with three significant figures."""
    return f"{value:.3g}"


def scientific(value: float) -> str:
    """Write a rounding error in scientific notation."""
    return f"{value:.1e}"


def last_part(name: str) -> str:
    """The last part of the name of a model."""
    return name.rstrip("/").rpartition("/")[2]


def yes_or_no(value: bool) -> str:
    """Write a truth value as yes or no."""
    return "yes" if value else "no"


def span(bounds: Iterable[float] | None, write: Format) -> str:
    """Write an interval; empty if there is none."""
    return " to ".join(map(write, bounds)) if bounds else ""


def markdown_row(cells: Iterable[str]) -> str:
    """A row of a Markdown table."""
    return f"| {' | '.join(cells)} |"


@dataclass(frozen=True)
class Metric:
    """Name and format of one measured number.

    `heading` and `write` are for pages and Markdown (no heading: not there), `short` and `brief`
    for tables of the console. `summary` is the heading in the table of all models (None: not
    there; empty: the data set alone is the heading). `of` names the number that this is another
    statistic of. Tables show intervals where `interval`; `--fail-under` knows the number where
    `bound`. `gain` names the number that says how much better this one is than a baseline's.
    """

    name: str
    heading: str = ""
    write: Format = number
    better: Better | None = None
    unit: str = ""
    short: str = ""
    brief: Format = exact
    summary: str | None = None
    of: str = ""
    interval: bool = False
    bound: bool = True
    gain: str = ""

    @property
    def label(self) -> str:
        """The heading where there is little room."""
        return self.short or self.heading

    @property
    def axis(self) -> str:
        """The label of an axis."""
        return ", ".join(filter(None, (self.heading, self.unit)))

    @property
    def best(self) -> Callable[..., float] | None:
        """The function that picks the best of several values, None without a direction."""
        return {"higher": max, "lower": min, None: None}[self.better]

    def written(self, found: Mapping[str, object]) -> str:
        """The number for a page, empty where it is missing."""
        return "" if found.get(self.name) is None else self.write(found[self.name])

    def shown(self, found: Mapping[str, object]) -> str:
        """The number for the console: empty where it is unknown, - where it has no value."""
        if self.name not in found:
            return ""
        return "-" if found[self.name] is None else self.brief(found[self.name])


def counted(name: str, heading: str, write: Format = count, brief: Format = count) -> Metric:
    """A number that says how much was measured or of which size, so that it has no bound."""
    return Metric(name, heading, write, brief=brief, bound=False)


TOKENS = counted("tokens", "tokens")
KL = Metric(
    "kl", "KL", better="lower", unit="nats per token", short="kl", summary="KL", interval=True
)
AGREEMENT = Metric(
    "agreement", "agreement", percent, "higher", summary="agreement", interval=True
)  # fmt: skip
REVERSE_KL = Metric("reverse_kl", "reverse KL", better="lower", unit="nats per token")
CE = Metric("ce", better="lower", unit="nats per token")
TEACHER_CE = Metric("teacher_ce", better="lower", unit="nats per token")
PERPLEXITY = Metric("perplexity", "perplexity", ratio, "lower", short="ppl")
TEACHER_PERPLEXITY = Metric(
    "teacher_perplexity", "teacher's", ratio, "lower", short="teacher ppl"
)  # fmt: skip
PERPLEXITY_RATIO = Metric(
    "perplexity_ratio", "ratio", ratio, "lower", summary="perplexity ratio", interval=True
)
RECALL = Metric("recall", "recalled", percent, "higher", summary="")
RECALL_RATIO = Metric("recall_ratio", "over the teacher's", ratio, "higher", interval=True)
# over all probes together
MEAN_RECALL_RATIO = Metric(
    "mean_recall_ratio", "mean over the teacher's", ratio, "higher", short="mean ratio",
    summary="mean ratio", interval=True,
)  # fmt: skip
LEAST_RECALL_RATIO = Metric(
    "least_recall_ratio", "least over the teacher's", ratio, "higher", short="least ratio",
    summary="least ratio",
)  # fmt: skip
RECALL_RATIOS = (
    MEAN_RECALL_RATIO,
    # the lower end of its interval, for a bound that has to be reached beyond chance
    Metric(f"{MEAN_RECALL_RATIO.name}_low", better="higher"),
    LEAST_RECALL_RATIO,
)
RETRIEVED = Metric("retrieved", "retrieved", percent, "higher", brief=lambda cell: f"{cell:.2g}")
NEEDLE_RATIO = Metric("needle_ratio", "over the teacher's", ratio, "higher", interval=True)
# the lower end of its interval
NEEDLE_RATIO_LOW = Metric(f"{NEEDLE_RATIO.name}_low", better="higher")
# of the scores of all tasks, student less teacher
MEAN_DIFFERENCE = Metric("mean_difference", write=signed, better="higher")
EXACT_MATCH = Metric("exact_match", "same text", percent, "higher", summary="same text")

SPEED = "tokens/s"
DRAFTED_TOKENS = counted("k", "K", str, significant)
ROWS = counted("batch_size", "rows", str)
CONTEXT = counted("input_len", "context", str)
PREFILL_RATE = Metric(
    "prefill_tokens_per_second", "prefill tok/s", whole, "higher", SPEED, brief=grouped_tenths,
    gain="prefill_speedup",
)  # fmt: skip
DECODE_RATE = Metric(
    "decode_tokens_per_second", "plain tok/s", rate, "higher", SPEED, "decode tok/s",
    grouped_tenths, gain="decode_speedup",
)  # fmt: skip
FIRST_TOKEN = Metric(
    "first_token_ms", "first token, ms", tenths, "lower", "ms", "first ms", grouped_tenths,
    gain="first_token_speedup",
)  # fmt: skip
DECODE_LIMIT = Metric("decode_byte_limit", unit=SPEED)
DECODE_SHARE = Metric(
    "decode_share", "of the byte limit", whole_percent, "higher", short="of limit",
    brief=tight_percent,
)  # fmt: skip
CACHE = Metric(
    "cache_bytes", "cache MiB", mebibytes, "lower", "bytes", brief=mebibytes,
    gain="cache_reduction",
)  # fmt: skip
SHARE = Metric("share", "of the teacher's", percent, "lower", brief=percent, bound=False)
PEAK = Metric("peak_bytes", "peak MiB", mebibytes, "lower", "bytes", brief=mebibytes)
PREFILL_GAIN, FIRST_GAIN, DECODE_GAIN, CACHE_GAIN = (
    Metric(metric.gain, f"{what} gain", times, "higher", brief=times)
    for metric, what in (
        (PREFILL_RATE, "prefill"),
        (FIRST_TOKEN, "first token"),
        (DECODE_RATE, "decode"),
        (CACHE, "cache"),
    )
)
DRAFTED_RATE = Metric(
    "speculative_tokens_per_second", "speculative tok/s", rate, "higher", SPEED, "spec tok/s",
    grouped_tenths,
)  # fmt: skip
DRAFTED_SHARE = Metric(
    "speculative_share", "of the limit", percent, "higher", short="of limit", brief=tight_percent
)
DRAFTED_GAIN = Metric("speculative_speedup", "speed-up", times, "higher", brief=times)
ACCEPTANCE = Metric("acceptance", "accepted", percent, "higher", brief=tight_percent)
STEP_TOKENS = Metric(
    "tokens_per_step", "tokens/step", hundredths, "higher", short="tok/step", brief=significant
)
STEP_RATE = Metric("tokens_per_second", "tok/s", whole, "higher", SPEED, brief=grouped_tenths)
MILLISECONDS = Metric("milliseconds", "ms", tenths, "lower", "ms", brief=tenths)
FIRST_LOSS = Metric("first_loss", "first loss", brief=significant)
LAST_LOSS = Metric("last_loss", "last loss", better="lower", brief=significant)
GRADIENT_ERROR = Metric("gradient_error", short="error", better="lower", brief=scientific)
# a point as a document shows it
POINT = (
    DRAFTED_TOKENS,
    counted(ROWS.name, "batch", str),
    CONTEXT,
    FIRST_TOKEN,
    DECODE_RATE,
    DECODE_SHARE,
    DRAFTED_RATE,
    STEP_TOKENS,
    DRAFTED_GAIN,
)

METRICS: dict[str, tuple[Metric, ...]] = {
    "fidelity": (
        TOKENS,
        KL,
        REVERSE_KL,
        AGREEMENT,
        Metric("top5", "top 5", percent, "higher"),
        Metric("acceptance", "acceptance", percent, "higher"),
        CE,
        TEACHER_CE,
        Metric("kl_p95", "KL, 95th percentile", better="lower", unit=KL.unit, of=KL.name),
        PERPLEXITY,
        TEACHER_PERPLEXITY,
        PERPLEXITY_RATIO,
        Metric("ece", "ECE", better="lower", interval=True),
        Metric("teacher_ece", "teacher's ECE", better="lower"),
        Metric("ece_to_teacher", "ECE to teacher", better="lower"),
    ),
    "recall": (
        RECALL,
        Metric("token_recall", "tokens recalled", percent, "higher"),
        Metric("recall_loss", "loss", better="lower", unit="nats per token"),
        RECALL_RATIO,
        *RECALL_RATIOS,
    ),
    # of the cache of one sequence, by its tokens
    "sequence": (
        Metric("total", "MiB", mebibytes, "lower", "bytes", brief=mebibytes, bound=False),
        Metric("teacher_total", "teacher's MiB", mebibytes, unit="bytes", brief=mebibytes,
               bound=False),
        SHARE,
    ),
    "needle": (RETRIEVED, NEEDLE_RATIO, NEEDLE_RATIO_LOW),
    "generation": (
        counted("prompts", "prompts", brief=str),
        Metric("forced_agreement", "forced agreement", percent, "higher",
               summary="forced agreement"),
        Metric("prefix_tokens", "same tokens at the start", tenths, "higher"),
        Metric("prefix_share", "share of the text", percent, "higher", summary="same prefix"),
        EXACT_MATCH,
        Metric("position_match", "same place", percent, "higher"),
        Metric("token_f1", "token F1", percent, "higher"),
    ),
    "preferences": (
        counted("pairs", "pairs"),
        Metric("reward_accuracy", "accuracy", percent, "higher", summary="accuracy"),
        Metric("reward_margin", "margin", better="higher", unit="nats"),
        Metric("normed_accuracy", "per token", percent, "higher"),
        Metric("logp_chosen", "log p, chosen", grouped_tenths, unit="nats", short="log p +"),
        Metric("logp_rejected", "log p, rejected", grouped_tenths, unit="nats", short="log p -"),
        Metric("kl_to_reference", "KL to teacher", better="lower", unit=KL.unit,
               short="KL to ref"),
        Metric("kl_from_reference", "KL from teacher", better="lower", unit=KL.unit,
               short="KL of ref"),
    ),
    # the harness has hundreds; those that are better when lower
    "tasks": tuple(
        Metric(name, name, better="lower")
        for name in (
            "word_perplexity", "byte_perplexity", "bits_per_byte", "brier_score", "ter",
            PERPLEXITY.name,
        )
    ) + (MEAN_DIFFERENCE,),
    "training": (
        counted("steps", "steps"),
        TOKENS,
        Metric("seconds", "seconds", whole, "lower"),
        FIRST_LOSS,
        LAST_LOSS,
        KL,
        AGREEMENT,
        # of a student that writes the text it learns from
        counted("written_tokens", "written"),
        counted("answers", "answers"),
        Metric("ended", "ended", percent),
        PEAK,
    ),
    "decoding": (
        PREFILL_RATE,
        FIRST_TOKEN,
        DECODE_RATE,
        DECODE_SHARE,
        CACHE,
        PEAK,
    ),
    "drafting": (
        DRAFTED_TOKENS,
        DRAFTED_RATE,
        DRAFTED_SHARE,
        STEP_TOKENS,
        ACCEPTANCE,
        DRAFTED_GAIN,
    ),
    "point": POINT,
    "speed": (
        PREFILL_RATE,
        *POINT,
        DRAFTED_SHARE,
        ACCEPTANCE,
        CACHE,
        PEAK,
        DECODE_GAIN,
        CACHE_GAIN,
    ),
    "drafts": (
        counted("draft", "draft", last_part, last_part),
        DRAFTED_TOKENS,
        ACCEPTANCE,
        STEP_TOKENS,
        Metric(STEP_RATE.name, "tok/s", grouped_tenths, "higher", SPEED),
        Metric("plain_tokens_per_second", "plain tok/s", grouped_tenths, "higher", SPEED),
        Metric("speedup", "speed-up", times, "higher"),
        Metric("identical", "same tokens", yes_or_no),
    ),
    "steps": (
        counted("stage", "stage", str),
        ROWS,
        counted(CONTEXT.name, "tokens per row"),
        STEP_RATE,
        MILLISECONDS,
        PEAK,
        FIRST_LOSS,
        LAST_LOSS,
    ),
    "kernels": (
        ROWS,
        Metric("fused_microseconds", "replay us", tenths, "lower", "us"),
        Metric("snapshots_microseconds", "state per token us", tenths, "lower", "us"),
        Metric("ratio", "ratio", times, "higher"),
        Metric("error", "error", scientific, "lower"),
    ),
    "loss": (
        TOKENS,
        counted("hidden", "hidden"),
        counted("vocab", "vocabulary"),
        Metric(MILLISECONDS.name, "ms", hundredths, "lower", "ms"),
        Metric("flops_per_second", "FLOP/s", significant, "higher", "FLOP/s"),
        Metric(PEAK.name, "MiB beyond", mebibytes, "lower", "bytes"),
        Metric("error_value", "error", scientific, "lower"),
    ),
}  # fmt: skip

# the numbers that a name of a data set or task stands for
MAIN = (AGREEMENT.name, "acc", EXACT_MATCH.name, "average")


def group(name: str) -> tuple[Metric, ...]:
    """The numbers of one kind of measurement; none of an unknown one."""
    return METRICS.get(name, ())


def columns(metrics: Iterable[Metric], rows: Iterable[Mapping[str, object]]) -> list[Metric]:
    """The numbers with a heading that some row has, each statistic behind what it is one of."""
    found = list(rows)
    listed = [
        each for each in metrics if each.heading and any(each.name in row for row in found)
    ]  # fmt: skip
    ordered = [each for each in listed if not each.of]
    for each in listed:
        if each.of:
            names = [other.name for other in ordered]
            ordered.insert(names.index(each.of) + 1 if each.of in names else len(names), each)
    return ordered
