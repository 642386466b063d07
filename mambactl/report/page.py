"""The page: every section there is something for, in `page.html`, with all text escaped."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from importlib.resources import files
from pathlib import Path

from mambactl.errors import UsageError
from mambactl.evaluation.probes import PROBES
from mambactl.files import NAMED_FILE, explained, replacing
from mambactl.report import cache_section, charts, details, headline, quality, speed_sections
from mambactl.report.collect import collect
from mambactl.report.content import Material, Section, Table
from mambactl.report.entries import Found
from mambactl.version import __version__

TEMPLATE = "page.html"
# beside the name of a model and the sources
MOST_COLUMNS = 7
Maker = Callable[[Material], Section]

MARKS = "●■▲◆▼◀▶"
# probes with charts of their own; the others have tables
DRAWN: dict[str, Maker] = {
    "fidelity": quality.faithfulness,
    "layers": details.layers,
    "recall": quality.recall,
    "needle": quality.needle,
    "tasks": details.tasks,
}
# in this order, probes by their names; those that are not named here come after
FIRST: tuple[str | Maker, ...] = (
    headline.kept_and_won,
    quality.overview,
    "fidelity",
    "layers",
    quality.controls,
    quality.training,
    "recall",
    "needle",
    cache_section.quality_by_cache,
    "generation",
    "tasks",
    "preferences",
)
LAST: tuple[Maker, ...] = (
    speed_sections.throughput,
    speed_sections.memory,
    speed_sections.drafts,
    speed_sections.benches,
)


def makers() -> Iterator[Maker]:
    """Functions that make the sections, in their order."""
    others = (name for name in PROBES if name not in FIRST)
    for each in (*FIRST, *others, *LAST):
        if isinstance(each, str):
            yield DRAWN.get(each, partial(details.numbers, PROBES[each]))
        else:
            yield each


def write_report(
    paths: Sequence[Path],
    out: Path,
    command: str,
    title: str = "",
    digest_of: Callable[[Path], str] | None = None,
) -> None:
    """Write one HTML file about everything that `paths` hold; `collect` says what that is.

    `command` is what made the page. Raises UsageError where nothing is there to show, ResourceError
    without matplotlib, OutputError where `out` cannot be written.
    """
    text = render(collect(paths, digest_of), command, title)
    with explained(out, *NAMED_FILE):
        out.parent.mkdir(parents=True, exist_ok=True)
        with replacing(out) as new:
            new.write_text(text, encoding="utf-8")


def render(found: Found, command: str, title: str = "") -> str:
    """The page as text."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    material = Material(found)
    sections = [section for section in (make(material) for make in makers()) if section]
    if not sections:
        raise UsageError(
            "nothing measured is there to show", "give results of eval, bench or spec-decode"
        )
    names = iter(range(1, 1 + sum(len(section.figures) for section in sections)))

    def drawing(svg: str) -> Markup:
        # made by matplotlib, which escapes the text it draws
        return Markup(charts.named_apart(svg, f"f{next(names)}-"))

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["drawing"] = drawing
    template = environment.from_string(
        files("mambactl.report").joinpath(TEMPLATE).read_text("utf-8")
    )
    return template.render(
        title=title or _title(found),
        command=command,
        version=__version__,
        sections=sections,
        sources=material.sources,
        mark=_mark,
        outdated=[
            n for n, source in enumerate(material.sources, 1) if "attention" in dict(source.details)
        ],
        shade=lambda number: "" if number == charts.NEUTRAL else f"k{number % charts.COLOURS}",
        pieces=_pieces,
        first=headline.KEY,
        about=_about(sections),
    )


def _title(found: Found) -> str:
    models = list(dict.fromkeys(each.model for each in (*found.entries, *found.ledgers)))
    return models[0] if len(models) == 1 else f"{len(models)} models compared"


def _mark(number: int) -> str:
    return "–" if number == charts.NEUTRAL else MARKS[number % len(MARKS)]


def _pieces(table: Table) -> Iterator[Table]:
    """The table, or several below each other where its columns would not fit a page."""
    first, *others = range(len(table.columns))
    count = max(1, -(-len(others) // MOST_COLUMNS))
    size = max(1, -(-len(others) // count))
    for number in range(count):
        kept = [first, *others[number * size : (number + 1) * size]]
        caption = table.caption if count == 1 else f"{table.caption} ({number + 1} of {count})"
        yield replace(
            table,
            caption=caption,
            columns=[table.columns[column] for column in kept],
            rows=[[row[column] for column in kept] for row in table.rows],
        )


def _about(sections: Sequence[Section]) -> str:
    tables = sum(len(section.tables) for section in sections)
    figures = sum(len(section.figures) for section in sections)
    return f"{_counted(tables, 'table')} and {_counted(figures, 'chart')}"


def _counted(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
