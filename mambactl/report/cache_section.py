"""The section that sets KL and recall against the cache that a sequence takes."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from operator import itemgetter

from mambactl.evaluation.sequences import CACHE, SEQUENCES
from mambactl.json_values import AnyObject
from mambactl.metrics import KL, LEAST_RECALL_RATIO, MEAN_RECALL_RATIO, SHARE, group, span
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
)
from mambactl.report.summary import MODEL, Column, Row, summarise

# numbers that a smaller cache may cost
QUALITY = (KL, MEAN_RECALL_RATIO, LEAST_RECALL_RATIO)
SIZE = group("sequence")[0]
PER_CENT = 100


@dataclass(frozen=True)
class _Student:
    """A model's quality, and bytes of its cache by tokens of a sequence."""

    row: Row
    sequences: Mapping[str, AnyObject]

    def share(self, tokens: str) -> float | None:
        """Fraction of the teacher's cache, None where it is not known."""
        return self.sequences.get(tokens, {}).get(SHARE.name)


def quality_by_cache(material: Material) -> Section:
    """A table of models, and a chart of every number over the share of the teacher's cache."""
    section = Section(
        "cache",
        "Quality over cache",
        "Bytes that the decode engine needs for one sequence: keys and values, windows, states, "
        "and the projections that states are replayed from.",
    )
    students = list(_students(material))
    lengths = sorted({n for each in students for n in each.sequences}, key=int)
    measured = dict.fromkeys(column for each in students for column in each.row.cells)
    columns = [column for column in measured if column.metric in QUALITY]
    if not columns:
        return section
    section.tables.append(_table(material, section, students, lengths, columns))
    for column in columns:
        if column.metric is not LEAST_RECALL_RATIO:
            section.figures += _figure(material, section, students, lengths, column)
    return section


def _students(material: Material) -> Iterator[_Student]:
    for row in summarise(material.entries).rows:
        every = (present(each.metrics, CACHE).get(SEQUENCES) for each in row.entries)
        found = next((each for each in every if isinstance(each, Mapping)), None)
        if row.kind == MODEL and found:
            yield _Student(row, found)


def _heading(column: Column) -> str:
    return ", ".join(filter(None, (column.heading, column.group)))


def _table(
    material: Material,
    section: Section,
    students: list[_Student],
    lengths: list[str],
    columns: list[Column],
) -> Table:
    headings, rows = ["model"], []
    for tokens in lengths:
        headings += [f"MiB at {int(tokens):,}", SHARE.heading]
    headings += [_heading(column) for column in columns]
    for each in students:
        cells = [Cell(each.row.name, number=False)]
        for tokens in lengths:
            sizes = each.sequences.get(tokens, {})
            cells += [Cell(SIZE.written(sizes)), Cell(SHARE.written(sizes))]
        for column in columns:
            held = each.row.cells.get(column)
            cells.append(
                Cell("")
                if held is None
                else Cell(column.write(held.value), span(held.interval, column.write))
            )
        rows.append(cells)
    cites = [material.cite(section, *each.row.entries) for each in students]
    return Table("One sequence", headings, rows, cites)


def _figure(
    material: Material,
    section: Section,
    students: list[_Student],
    lengths: list[str],
    column: Column,
) -> Iterator[Figure]:
    """The number of every model over its cache, a line per length of a sequence."""
    series = []
    for colour, tokens in enumerate(lengths):
        found = [
            ((PER_CENT * share, held.value), held.interval)
            for each in students
            if (share := each.share(tokens)) is not None
            and (held := each.row.cells.get(column)) is not None
        ]
        if len(found) > 1:
            points, errors = zip(*sorted(found, key=itemgetter(0)), strict=True)
            name = f"{int(tokens):,} tokens"
            series.append(Series(name, colour, points, errors=errors))
    if not series:
        return
    title = f"{_heading(column)} over cache"
    svg = charts.lines(series, "cache of a sequence, % of the teacher's", column.metric.axis)
    alt = f"{column.heading} of {len(students)} models over their caches at {len(lengths)} lengths"
    rows = [
        (
            (
                each.row.name,
                *(SHARE.written(each.sequences.get(tokens, {})) for tokens in lengths),
                column.write(each.row.cells[column].value),
            ),
            material.cite(section, *each.row.entries),
        )
        for each in students
        if column in each.row.cells
    ]
    names = ["model", *(f"cache at {int(tokens):,}" for tokens in lengths), column.heading]
    yield Figure(title, svg, alt, legend(series), table=numbers_of(title, names, rows))
