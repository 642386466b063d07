"""Content of a page: sections of tables and figures, and the sources that they cite."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from mambactl.evaluation.probes.probe import AnyProbe
from mambactl.json_values import AnyObject
from mambactl.metrics import Metric
from mambactl.report.charts import Series
from mambactl.report.entries import Entry, Found, Ledger, Source


@dataclass(frozen=True)
class Cell:
    """Text of a table; `note` is set smaller beside it, `best` stands out."""

    text: str
    note: str = ""
    best: bool = False
    number: bool = True


@dataclass(frozen=True)
class Table:
    """Rows whose first cell is their heading and whose last are the numbers of their sources.

    `kinds` are one class per row.
    """

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    cites: Sequence[Sequence[int]]
    kinds: Sequence[str] = ()


@dataclass(frozen=True)
class Figure:
    """A chart, what it says in words, the names of its colours, and its numbers."""

    title: str
    svg: str
    alt: str
    legend: Sequence[tuple[str, int]] = ()
    note: str = ""
    table: Table | None = None


@dataclass
class Section:
    """A heading with what belongs to it; `cites` are numbers of sources."""

    key: str
    title: str
    text: str = ""
    tables: list[Table] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    cites: set[int] = field(default_factory=set)

    def __bool__(self) -> bool:
        return bool(self.tables or self.figures)


class Material:
    """All measurements, a colour for every model, and a number for every source."""

    def __init__(self, found: Found):
        self.entries, self.ledgers = found.entries, found.ledgers
        everything: list[Entry | Ledger] = [*found.entries, *found.ledgers]
        self.sources: list[Source] = list(dict.fromkeys(each.source for each in everything))
        self._numbers = {source: n for n, source in enumerate(self.sources, 1)}
        self._colours: dict[str, int] = {}
        for each in everything:
            self.colour(each.model)

    def colour(self, model: str) -> int:
        """The number of a model's colour, the same in every chart."""
        return self._colours.setdefault(model, len(self._colours))

    def cite(self, section: Section, *each: Entry | Ledger) -> list[int]:
        """The numbers of the sources, which the section then names."""
        numbers = sorted({self._numbers[one.source] for one in each})
        section.cites.update(numbers)
        return numbers


def section_of(probe: AnyProbe) -> Section:
    """The empty section of a probe."""
    return Section(probe.name, probe.title, probe.about)


def legend(series: Iterable[Series]) -> list[tuple[str, int]]:
    """Every name once, with its colour."""
    return list({each.name: (each.name, each.colour) for each in series}.values())


def numbers_of(
    caption: str, columns: Sequence[str], rows: Iterable[tuple[Sequence[object], list[int]]]
) -> Table:
    """A plain table of a figure's numbers: cells that are text already, and sources."""
    listed = list(rows)
    cells = [[Cell(str(text)) for text in texts] for texts, _ in listed]
    return Table(caption, columns, cells, [cites for _, cites in listed])


def present(metrics: AnyObject, kind: str) -> AnyObject:
    """Measurements of one kind, empty without any."""
    found = metrics.get(kind)
    return found if isinstance(found, Mapping) else {}


def written(found: AnyObject, columns: Iterable[Metric]) -> list[Cell]:
    """A row of cells; empty where nothing is."""
    return [
        Cell(each.written(found), number=not isinstance(found.get(each.name), str))
        for each in columns
    ]
