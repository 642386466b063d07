"""The tables that `bench` shows."""

from collections.abc import Callable, Sequence
from typing import Any

from mambactl import console

Point = dict[str, Any]


def times(ratio: float | None) -> str:
    """A ratio for people."""
    return "-" if ratio is None else f"{ratio:.2f}x"


def name(point: Point) -> str:
    """Context length and rows."""
    return f"{point['input_len']} x {point['batch_size']}"


def _rate(value: float | None) -> str:
    return "-" if value is None else f"{value:,.1f}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def _error(value: float | None) -> str:
    # of float32, far less than a per cent
    return "-" if value is None else f"{value:.1e}"


def _mib(value: float | None) -> str:
    return "-" if value is None else f"{value / 2**20:,.2f}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


# heading, key, how it is written, and the key of the gain over a baseline
Column = tuple[str, str, Callable[[Any], str], str]
PLAIN: tuple[Column, ...] = (
    ("prefill tok/s", "prefill_tokens_per_second", _rate, "prefill_speedup"),
    ("decode tok/s", "decode_tokens_per_second", _rate, "decode_speedup"),
    ("of limit", "decode_share", _share, ""),
    ("cache MiB", "cache_bytes", _mib, "cache_reduction"),
    ("peak MiB", "peak_bytes", _mib, ""),
)
SPECULATIVE: tuple[Column, ...] = (
    ("K", "k", _number, ""),
    ("spec tok/s", "speculative_tokens_per_second", _rate, ""),
    ("of limit", "speculative_share", _share, ""),
    ("tok/step", "tokens_per_step", _number, ""),
    ("accepted", "acceptance", _share, ""),
    ("speed-up", "speculative_speedup", times, ""),
)


def show(title: str, metrics: dict[str, Any], more: Sequence[Column] = ()) -> None:
    """Every point of a model, each with the baseline's below it if there is one; then what drafts
    came to, if they were measured, and `more`.
    """
    points: list[Point] = metrics["points"]
    others: list[Point] = metrics.get("baseline_points", [])
    where = f"on {metrics['device']} in {metrics['dtype']}"
    against = f", against {metrics['baseline']}" if others else ""
    lines = []
    for index, point in enumerate(points):
        lines.append((name(point), "model" if others else "", *_cells(point, PLAIN)))
        if others:
            lines.append(("", "baseline", *_cells(others[index], PLAIN)))
            gains = (times(point[gain]) if gain else "" for *_, gain in PLAIN)
            lines.append(("", "gain", *gains))
    _table(f"{title} {where}{against}", ("", *(column[0] for column in PLAIN)), lines)
    drafted = any(SPECULATIVE[0][1] in point for point in points)
    if columns := [*(SPECULATIVE if drafted else ()), *more]:
        draft = metrics["config"]["draft"]
        title = f"{title} with {draft} {where}" if draft else f"{title} {where}"
        lines = [(name(point), *_cells(point, columns)) for point in points]
        _table(title, [column[0] for column in columns], lines)


def _table(title: str, headings: Sequence[str], lines: list[tuple[str, ...]]) -> None:
    console.table(title, ("context x rows", *headings), lines)


def _cells(point: Point, columns: Sequence[Column]) -> list[str]:
    return [write(point[key]) if key in point else "" for _, key, write, _ in columns]


def show_training(metrics: dict[str, Any]) -> None:
    """Steps of every stage: speed, memory, and what was checked in the same run."""
    columns = ("stage", "rows x tokens", "tok/s", "ms", "peak MiB", "loss", "error")
    for model in dict.fromkeys(point["model"] for point in metrics["points"]):
        lines = [
            (
                point["stage"],
                f"{point['batch_size']} x {point['input_len']}",
                _rate(point["tokens_per_second"]),
                f"{point['milliseconds']:.1f}",
                _mib(point["peak_bytes"]),
                f"{point['first_loss']:.3g} to {point['last_loss']:.3g}",
                _error(point["gradient_error"]),
            )
            for point in metrics["points"]
            if point["model"] == model
        ]
        title = f"training {model} on {metrics['device']} in {metrics['dtype']}"
        console.table(title, columns, lines)
