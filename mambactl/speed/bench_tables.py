"""The tables that `bench` shows."""

from collections.abc import Sequence
from typing import Any

from mambactl import console, metrics
from mambactl.metrics import Metric

Point = dict[str, Any]


LOSS_ERRORS = ("error_value", "error_hidden_gradient", "error_weight_gradient")
VERIFY = (Metric("verify_ratio", "verify", better="lower", brief=metrics.times),)


def name(point: Point) -> str:
    """Context length and rows."""
    return f"{point['input_len']} x {point['batch_size']}"


def show(title: str, result: dict[str, Any]) -> None:
    """Every point of a model, each with the baseline's below it if there is one; then what drafts
    and verification came to, if they were measured.
    """
    points: list[Point] = result["points"]
    others: list[Point] = result.get("baseline_points", [])
    where = f"on {result['device']} in {result['dtype']}"
    against = f", against {result['baseline']}" if others else ""
    plain = metrics.group("decoding")
    lines = []
    for index, point in enumerate(points):
        lines.append((name(point), "model" if others else "", *_cells(point, plain)))
        if others:
            lines.append(("", "baseline", *_cells(others[index], plain)))
            lines.append(("", "gain", *(_gain(point, each) for each in plain)))
    _table(f"{title} {where}{against}", ("", *(each.label for each in plain)), lines)
    columns = [
        each
        for group in (metrics.group("drafting"), VERIFY)
        for each in group
        if any(group[0].name in point for point in points)
    ]
    if columns:
        draft = result["config"]["draft"]
        title = f"{title} with {draft} {where}" if draft else f"{title} {where}"
        lines = [(name(point), *_cells(point, columns)) for point in points]
        _table(title, [each.label for each in columns], lines)


def _table(title: str, headings: Sequence[str], lines: list[tuple[str, ...]]) -> None:
    console.table(title, ("context x rows", *headings), lines)


def _cells(point: Point, columns: Sequence[Metric]) -> list[str]:
    return [each.shown(point) for each in columns]


def _gain(point: Point, metric: Metric) -> str:
    return Metric(metric.gain, brief=metrics.times).shown(point)


def show_kernels(result: dict[str, Any]) -> None:
    """The kernel that replays against the one that stores a state per token."""
    columns = ("rows", "replay us", "MB", "GB/s", "per token us", "MB", "GB/s", "ratio")
    lines = []
    for row in result["kernels"]:
        cells = [row["batch_size"]]
        for way in ("fused", "snapshots"):
            cells.append(f"{row[f'{way}_microseconds']:.1f}")
            cells.append(f"{row[f'{way}_bytes'] / 1e6:.1f}")
            cells.append(f"{row[f'{way}_bytes_per_second'] / 1e9:,.0f}")
        lines.append((*cells, metrics.times(row["ratio"])))
    console.table(f"Mamba-2 layer on {result['device']} in {result['dtype']}", columns, lines)


def show_loss(result: dict[str, Any]) -> None:
    """A loss through the head: time, memory and errors."""
    row = result["loss"]
    shape = f"{row['tokens']} x {row['hidden']} x {row['vocab']}"
    columns = ("ms", "TFLOP/s", "MiB beyond", "error", "of dx", "of dW")
    cells = [
        f"{row['milliseconds']:.2f}",
        metrics.significant(row["flops_per_second"] / 1e12),
        metrics.PEAK.shown(row),
        *(f"{row[key]:.1e}" for key in LOSS_ERRORS),
    ]
    title = f"KL through a head of {shape} on {result['device']} in {result['dtype']}"
    console.table(title, columns, [cells])


def show_training(result: dict[str, Any]) -> None:
    """Steps of every stage: speed, memory, and what was checked in the same run."""
    numbers = (metrics.STEP_RATE, metrics.MILLISECONDS, metrics.PEAK)
    columns = ("stage", "rows x tokens", *(each.label for each in numbers), "loss", "error")
    for model in dict.fromkeys(point["model"] for point in result["points"]):
        lines = [
            (
                point["stage"],
                f"{point['batch_size']} x {point['input_len']}",
                *_cells(point, numbers),
                " to ".join(_cells(point, (metrics.FIRST_LOSS, metrics.LAST_LOSS))),
                metrics.GRADIENT_ERROR.shown(point),
            )
            for point in result["points"]
            if point["model"] == model
        ]
        title = f"training {model} on {result['device']} in {result['dtype']}"
        console.table(title, columns, lines)
