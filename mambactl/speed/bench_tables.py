"""The tables that `bench` shows."""

from collections.abc import Sequence

from mambactl import console, metrics
from mambactl.json_values import JsonObject
from mambactl.metrics import Metric

Point = JsonObject


def name(point: Point) -> str:
    """Name of a point: context length and rows."""
    return f"{point['input_len']} x {point['batch_size']}"


def show(title: str, result: JsonObject, more: Sequence[Metric] = ()) -> None:
    """Every point of a model, each with the baseline's below it if there is one; then what drafts
    came to, if they were measured, and `more`.
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
    drafting = metrics.group("drafting")
    drafted = any(drafting[0].name in point for point in points)
    if columns := [*(drafting if drafted else ()), *more]:
        draft = result["config"]["draft"]
        title = f"{title} with {draft} {where}" if draft else f"{title} {where}"
        lines = [(name(point), *_cells(point, columns)) for point in points]
        _table(title, [each.label for each in columns], lines)


def _table(title: str, headings: Sequence[str], lines: list[tuple[str, ...]]) -> None:
    console.table(title, ("context x rows", *headings), lines)


def _cells(point: Point, columns: Sequence[Metric]) -> list[str]:
    intervals = point.get("intervals") or {}
    return [_cell(each, point, intervals.get(each.name)) for each in columns]


def _cell(metric: Metric, point: Point, interval: Sequence[float] | None) -> str:
    """A number with the smallest and the largest of the rounds, where they differ."""
    shown = metric.shown(point)
    if not interval or interval[0] == interval[1]:
        return shown
    return f"{shown} ({metrics.span(interval, metric.brief)})"


def _gain(point: Point, metric: Metric) -> str:
    return Metric(metric.gain, brief=metrics.times).shown(point)


def show_training(result: JsonObject) -> None:
    """Show the steps of every stage: speed, memory, and the checks of the same run."""
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
