"""One row per model: how faithful it is, what it recalls, how it scores, what its cache takes."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from mambactl.evaluation.harness.task_metrics import main_metric
from mambactl.evaluation.probes import PROBES, lower_is_better
from mambactl.evaluation.probes.probe import TEACHER, AnyProbe
from mambactl.json_values import AnyObject, JsonObject
from mambactl.metrics import CACHE, Format, Metric, number, percent
from mambactl.report.entries import Entry, against_of
from mambactl.report.thresholds import is_share, may_be_negative

# tokens of context that a cache is given for, where it was not measured
CONTEXT = 4096
# half the width of a 95 % interval, in standard errors
NORMAL_95 = 1.96

MODEL, CONTROL, REFERENCE = "model", "control", "reference"


@dataclass(frozen=True)
class Column:
    """A number with its heading under the heading of its group."""

    group: str
    heading: str
    metric: Metric

    @property
    def write(self) -> Format:
        """Format of its values."""
        return self.metric.write


@dataclass(frozen=True)
class Cell:
    """A value, its 95 % interval if known, and whether it is the best of its column."""

    value: float
    interval: tuple[float, float] | None = None


@dataclass
class Row:
    """A model, one of its controls, or what it is compared with."""

    name: str
    kind: str
    cells: dict[Column, Cell] = field(default_factory=dict)
    entries: list[Entry] = field(default_factory=list)


@dataclass(frozen=True)
class Summary:
    """Columns in the order of their groups, and rows in the order the models were given."""

    columns: list[Column]
    rows: list[Row]

    def best(self, column: Column) -> float | None:
        """The best value among models, where they differ."""
        own = [
            row.cells[column].value
            for row in self.rows
            if row.kind == MODEL and column in row.cells
        ]
        best = column.metric.best
        return best(own) if best and len(set(own)) > 1 else None


def summarise(entries: Iterable[Entry]) -> Summary:
    """Merge what was measured on each model; where two runs disagree, each has a row of its own."""
    rows: dict[str, list[Row]] = {}
    ends: list[Row] = []
    for entry in entries:
        own = dict(_cells(entry.metrics, entry.about))
        if own:
            _add(rows.setdefault(entry.model, []), entry, own)
        for name, cells in _references(entry.metrics):
            _merge(ends, name, REFERENCE, entry, cells)
    ordered = [row for group in rows.values() for row in group] + ends
    columns = dict.fromkeys(column for row in ordered for column in row.cells)
    groups = list(dict.fromkeys(column.group for column in columns))
    order = [g for g in groups if g not in ("recall", "tasks", "cache")]
    order += [g for g in ("recall", "tasks", "cache") if g in groups]
    return Summary(sorted(columns, key=lambda column: order.index(column.group)), ordered)


def _merge(rows: list[Row], name: str, kind: str, entry: Entry, cells: dict[Column, Cell]) -> Row:
    """The row of that name that says nothing else about these cells, or a new one."""
    alike = [row for row in rows if row.kind == kind and row.name.partition(" (run ")[0] == name]
    for row in alike:
        if all(row.cells[key] == cell for key, cell in cells.items() if key in row.cells):
            row.cells |= cells
            row.entries.append(entry)
            return row
    label = f"{name} (run {len(alike) + 1})" if alike else name
    rows.append(Row(label, kind, dict(cells), [entry]))
    return rows[-1]


def _add(rows: list[Row], entry: Entry, cells: dict[Column, Cell]) -> None:
    """Put cells into the rows of a model, and its controls below that row."""
    row = _merge(rows, entry.model, MODEL, entry, cells)
    start = end = rows.index(row) + 1
    while end < len(rows) and rows[end].kind == CONTROL:
        end += 1
    below = rows[start:end]
    for name, found in beside(entry).items():
        _merge(below, name, CONTROL, entry, dict(_cells(found, {})))
    rows[start:end] = below


def beside(entry: Entry) -> JsonObject:
    """Subjects measured together with a model: its controls, and the one it is tested against."""
    found = dict(entry.metrics.get("controls") or {})
    if name := against_of(entry):
        found[f"against {name}"] = entry.metrics["against"]
    return found


def _columns(
    metrics: AnyObject,
) -> Iterator[tuple[Column, Metric, AnyObject]]:
    """Possible columns: heading, number, and the results that may hold it."""
    # first what has a heading of its own for every data set
    for probe in sorted(PROBES.values(), key=lambda each: not each.by_set):
        shown = [each for each in probe.metrics if each.summary is not None]
        sets = metrics.get(probe.name) if shown else None
        for data, found in (sets or {}).items():
            if isinstance(found, Mapping):
                yield from ((_column(probe, each, data, found), each, found) for each in shown)


def _column(probe: AnyProbe, metric: Metric, data: str, found: AnyObject) -> Column:
    group = probe.group or ("" if probe.by_set else probe.name)
    # the only data set of a probe may bear its name, which says nothing
    named = "" if group and data == probe.name else data_set(data, found)
    if probe.by_set:
        return Column(", ".join(filter(None, (group, named))), metric.summary or "", metric)
    heading = " ".join(filter(None, (named, metric.summary)))
    return Column(group, heading or metric.heading, metric)


def _cells(metrics: AnyObject, about: AnyObject) -> Iterator[tuple[Column, Cell]]:
    for column, metric, found in _columns(metrics):
        if found.get(metric.name) is not None:
            yield column, Cell(found[metric.name], interval(found, metric.name))
    parts = parts_of_groups(metrics)
    for task, found in (metrics.get("tasks") or {}).items():
        if task not in parts and (key := main_metric(found)) is not None:
            better = "lower" if lower_is_better(key) else "higher"
            column = Column("tasks", f"{task} {key}", Metric(key, key, score_writer(key), better))
            yield column, Cell(found[key], interval(found, key))
    model = about.get("model")
    cache = model.get("cache") if isinstance(model, Mapping) else None
    if cache:
        size = cache["bytes_per_sequence"] + CONTEXT * cache["bytes_per_token"]
        yield Column("cache", f"MiB at {CONTEXT:,}", CACHE), Cell(size)


def _references(metrics: AnyObject) -> Iterator[tuple[str, dict[Column, Cell]]]:
    """The teacher, where it was measured by itself, and a guess."""
    teacher, chance = {}, {}
    for column, metric, found in _columns(metrics):
        if found.get("chance") is not None and found.get(metric.name) is not None:
            chance[column] = Cell(found["chance"])
        theirs = found.get(TEACHER)
        if isinstance(theirs, Mapping) and theirs.get(metric.name) is not None:
            teacher[column] = Cell(theirs[metric.name], interval(theirs, metric.name))
    if teacher:
        name = metrics.get(TEACHER)
        yield f"teacher {name}" if isinstance(name, str) else "teacher", teacher
    if chance:
        yield "guessing", chance


def parts_of_groups(metrics: AnyObject) -> set[str]:
    """Tasks that are measured as part of a group which has a score of its own."""
    groups = metrics.get("task_groups") or {}
    return {part for parts in groups.values() for part in parts}


def score_writer(metric: str) -> Callable[[float], str]:
    """Scores of tasks are shares, unless they are known to be on another scale."""
    return share if is_share(metric) else number


def share(value: float) -> str:
    """A score that should be a share: one beyond 1 is on a scale that nobody here knows."""
    return percent(value) if abs(value) <= 1 else number(value)


def data_set(name: str, found: AnyObject) -> str:
    """A data set is another one when other tokens of it were measured."""
    tokens = found.get("tokens")
    return name if tokens is None else f"{name}, {tokens:,} tokens"


def interval(found: AnyObject, key: str) -> tuple[float, float] | None:
    """The interval of a number: `KEY_ci`, `intervals.KEY`, or 95 % by its standard error.

    Scores of extracted answers are called METRIC:FILTER, their errors METRIC_stderr:FILTER.
    """
    for given in (found.get(f"{key}_ci"), (found.get("intervals") or {}).get(key)):
        if isinstance(given, Sequence) and len(given) == 2:
            return float(given[0]), float(given[1])
    metric, mark, extracted = key.partition(":")
    error = found.get(f"{metric}_stderr{mark}{extracted}")
    if not isinstance(error, int | float):
        return None
    low, high = found[key] - NORMAL_95 * error, found[key] + NORMAL_95 * error
    # a share of few rows has an error that reaches beyond what a share can be
    most = 1.0 if found[key] <= 1 and is_share(key) else high
    least = low if may_be_negative(key) else 0.0
    return max(low, least), min(high, most)
