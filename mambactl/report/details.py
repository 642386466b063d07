"""Sections of probes: errors of layers, scores of tasks, and tables of what has no charts."""

from collections.abc import Iterator, Mapping
from dataclasses import replace

from mambactl.evaluation.harness.task_metrics import main_metric, metrics_of
from mambactl.evaluation.probes import PROBES
from mambactl.evaluation.probes.probe import STUDENT, TEACHER, AnyProbe
from mambactl.evaluation.probes.task_probe import BY_TASK, DIFFERENCES, MEAN
from mambactl.json_values import AnyObject
from mambactl.metrics import columns, number, signed, span
from mambactl.report import charts
from mambactl.report.charts import Series
from mambactl.report.content import (
    Cell,
    Figure,
    Material,
    Section,
    Table,
    legend,
    numbers_of,
    present,
    section_of,
    written,
)
from mambactl.report.entries import Entry, against_of
from mambactl.report.summary import interval, parts_of_groups, score_writer
from mambactl.report.thresholds import is_share

# names of layers that fit below a chart
MOST_TICKS = 18


def students(entries: list[Entry]) -> Iterator[Entry]:
    """Every entry, and behind it the student that it was tested against, as one of its own."""
    known: list[tuple[str, object]] = [
        (each.model, each.metrics.get("fidelity")) for each in entries
    ]
    for entry in entries:
        yield entry
        other = present(entry.metrics, "against")
        name = against_of(entry)
        # one that was measured by itself as well needs no second row
        if name and (name, other.get("fidelity")) not in known:
            yield replace(entry, model=name, metrics=dict(other))


def layers(material: Material) -> Section:
    """The error of every new mixer, fed by the teacher."""
    section = section_of(PROBES["layers"])
    sets: dict[str, list[tuple[Entry, Mapping[str, float]]]] = {}
    for entry in students(material.entries):
        for data, errors in present(entry.metrics, "layers").items():
            sets.setdefault(data, []).append((entry, errors))
    for data, measured in sets.items():
        every = sorted({int(layer) for _, errors in measured for layer in errors})
        columns = {layer: column for column, layer in enumerate(every)}
        series = [
            Series(
                entry.model,
                material.colour(entry.model),
                sorted((columns[int(layer)], error) for layer, error in errors.items()),
            )
            for entry, errors in measured
        ]
        step = -(-len(every) // MOST_TICKS)
        labels = [str(layer) if column % step == 0 else "" for column, layer in enumerate(every)]
        svg = charts.steps(series, labels, "layer", "relative error")
        title = f"Error by layer, {data}"
        alt = f"Relative error of {len(every)} layers of {len(series)} models"
        cites = [material.cite(section, entry) for entry, _ in measured]
        texts = [
            (
                (
                    str(layer),
                    *(number(e[str(layer)]) if str(layer) in e else "" for _, e in measured),
                ),
                sorted({n for each in cites for n in each}),
            )
            for layer in every
        ]
        table = numbers_of(title, ["layer", *(entry.model for entry, _ in measured)], texts)
        section.figures.append(Figure(title, svg, alt, legend(series), table=table))
    return section


def numbers(probe: AnyProbe, material: Material) -> Section:
    """Tables of a probe without charts of its own, one per data set."""
    section = section_of(probe)
    section.tables += _tables(material, section, probe)
    return section


def _tables(material: Material, section: Section, probe: AnyProbe) -> Iterator[Table]:
    sets: dict[str, list[tuple[Entry, AnyObject]]] = {}
    for entry in material.entries:
        for name, found in present(entry.metrics, probe.name).items():
            if isinstance(found, Mapping):
                sets.setdefault(name, []).append((entry, found))
    for name, measured in sets.items():
        if not (shown := columns(probe.metrics, (found for _, found in measured))):
            continue
        rows = [
            [Cell(entry.model, number=False), *written(found, shown)] for entry, found in measured
        ]
        cites = [material.cite(section, entry) for entry, _ in measured]
        title = name.capitalize() if name == probe.name else f"On {name}"
        yield Table(title, ["model", *(each.heading for each in shown)], rows, cites)


# a name and a metric, on a line each
LABEL = 26


def tasks(material: Material) -> Section:
    """Scores with their intervals, a row per task; its numbers have every score of every part."""
    section = section_of(PROBES["tasks"])
    names: dict[str, None] = {}
    models: dict[str, list[tuple[str, float, tuple[float, float] | None]]] = {}
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
    section.tables += _beside_teachers(material, section)
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


def _beside_teachers(material: Material, section: Section) -> Iterator[Table]:
    """Scores of students and teachers on the same documents, and what is between them."""
    rows = []
    for entry in material.entries:
        found = present(entry.metrics, DIFFERENCES)
        tests = dict(present(found, BY_TASK))
        if mean := found.get(MEAN):
            tests[f"mean of {mean['tasks']}"] = mean
        for name, test in tests.items():
            metric = test.get("metric", "")
            write = score_writer(metric)
            scores = [write(test[who]) for who in (STUDENT, TEACHER)]
            interval = span(test.get("interval"), signed)
            texts = (entry.model, name, metric, *scores, signed(test["difference"]), interval)
            rows.append((texts, material.cite(section, entry)))
    if rows:
        headings = ["model", "task", "score", "student", "teacher", "difference", "interval"]
        yield _named_cells(numbers_of("Beside the teacher", headings, rows), 3)


def _scores(task: str, scores: AnyObject) -> Iterator[tuple[str, ...]]:
    for key in metrics_of(scores):
        write, bounds = score_writer(key), interval(scores, key)
        yield task, key, write(scores[key]), span(bounds, write)


def _named_cells(table: Table, names: int) -> Table:
    """The table with its first cells as text."""
    rows = [
        [replace(cell, number=index >= names) for index, cell in enumerate(row)]
        for row in table.rows
    ]
    return replace(table, rows=rows)
