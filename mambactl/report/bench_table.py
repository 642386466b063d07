"""The performance table of a README, made from the JSON that `bench` prints."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from mambactl.errors import UsageError

Metrics = dict[str, Any]


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _share(value: float) -> str:
    return f"{100 * value:.0f} %"


def _times(value: float) -> str:
    return f"{value:.2f}x"


def _mean(value: float) -> str:
    return f"{value:.2f}"


# heading, key of a point, how it is written
NUMBERS: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("K", "k", str),
    ("batch", "batch_size", str),
    ("context", "input_len", str),
    ("plain tok/s", "decode_tokens_per_second", _rate),
    ("of the byte limit", "decode_share", _share),
    ("speculative tok/s", "speculative_tokens_per_second", _rate),
    ("tokens/step", "tokens_per_step", _mean),
    ("speed-up", "speculative_speedup", _times),
)


def markdown(files: Sequence[tuple[str, dict[str, Any]]]) -> str:
    """A row per point of every file (name, content), then what they were measured on.

    A file holds one `bench` result, or a recipe's with any number of them. Raises UsageError for a
    file without any point.
    """
    headings = ("model", "draft", *(heading for heading, _, _ in NUMBERS))
    lines = [_line(headings), "|---|---|" + "--:|" * len(NUMBERS)]
    about: dict[str, None] = {}
    for name, content in files:
        rows = 0
        for metrics in _results(content):
            about[_machine(metrics)] = None
            for row in _rows(metrics):
                lines.append(_line(row))
                rows += 1
        if not rows:
            raise UsageError(f"{name} has no measured point", "give what `bench --json` printed")
    return "\n".join([*lines, "", *about])


def _results(content: dict[str, Any]) -> Iterator[Metrics]:
    sections = content.get("sections")
    for each in sections.values() if isinstance(sections, dict) else [content]:
        metrics = each.get("metrics") if isinstance(each, dict) else None
        if isinstance(metrics, dict) and metrics.get("points"):
            model = str(each.get("checkpoint") or "").rstrip("/").rpartition("/")[2]
            # files kept before points named their model
            points = [{"model": model, **point} for point in metrics["points"]]
            yield {**metrics, "points": points}


def _rows(metrics: Metrics) -> Iterator[list[str]]:
    draft = (metrics.get("config") or {}).get("draft")
    for point in [*metrics["points"], *metrics.get("baseline_points", [])]:
        own = draft if "speculative_speedup" in point else None
        numbers = ["" if point.get(key) is None else write(point[key]) for _, key, write in NUMBERS]
        yield [_short(point.get("model", "")), _short(own or ""), *numbers]


def _short(model: str) -> str:
    return model.rstrip("/").rpartition("/")[2]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _machine(metrics: Metrics) -> str:
    """One sentence: device, type of the weights, versions, date."""
    versions = (metrics.get("versions") or {}).items()
    parts = [metrics.get("device"), metrics.get("dtype")]
    parts += [f"{package} {version}" for package, version in versions if version]
    parts.append(metrics.get("date"))
    return f"Measured on {', '.join(str(part) for part in parts if part)}."
