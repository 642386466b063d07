"""The section about tasks: a chart of main scores, and every score of every part."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from mambactl.evaluation.probes import PROBES
from mambactl.metrics import span
from mambactl.report import charts
from mambactl.report.charts import Series
from mambactl.report.content import (
    Figure,
    Material,
    Section,
    Table,
    legend,
    numbers_of,
    present,
    section_of,
)
from mambactl.report.summary import interval, main_metric, metrics_of, parts_of_groups, score_writer
from mambactl.report.thresholds import is_share

# a name and a metric, on a line each
LABEL = 26


def tasks(material: Material) -> Section:
    """Scores with their intervals, a row per task; its numbers have every score of every part."""
    section = section_of(PROBES["tasks"])
    names: dict[str, None] = {}
    models: dict[str, list[tuple[str, float, Any]]] = {}
    rows = []
    for entry in material.entries:
        parts = parts_of_groups(entry.metrics)
        for task, scores in present(entry.metrics, "tasks").items():
            cites = material.cite(section, entry)
            rows += [((entry.model, *texts), cites) for texts in _scores(task, scores)]
            key = main_metric(scores)
            # a share, or it has no place on the axis
            if task not in parts and key is not None and is_share(key) and abs(scores[key]) <= 1:
                label = f"{task} {key}"
                names[label] = None
                models.setdefault(entry.model, []).append(
                    (label, scores[key], interval(scores, key))
                )
    if not rows:
        return section
    headings = ["model", "task", "score", "", "95 % interval"]
    table = _named_cells(numbers_of("Scores", headings, rows), 3)
    if not names:
        section.tables.append(table)
        return section
    labels = list(names)
    series = []
    for model, found in models.items():
        points = [(100 * value, labels.index(label)) for label, value, _ in found]
        errors = [bounds and (100 * bounds[0], 100 * bounds[1]) for *_, bounds in found]
        series.append(Series(model, material.colour(model), points, errors=errors))
    folded = [charts.folded(label, LABEL) for label in labels]
    svg = charts.dots(series, folded, "score, %")
    alt = f"Scores of {len(series)} models on {len(labels)} tasks"
    section.figures.append(Figure("Scores", svg, alt, legend(series), table=table))
    return section


def _scores(task: str, scores: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    for key in metrics_of(scores):
        write, bounds = score_writer(key), interval(scores, key)
        yield task, key, write(scores[key]), span(bounds, write)


def _named_cells(table: Table, names: int) -> Table:
    """The table with its first cells as text."""
    rows = [
        [replace(cell, number=place >= names) for place, cell in enumerate(row)]
        for row in table.rows
    ]
    return replace(table, rows=rows)
