"""Sections about how a student differs from its teacher: layers, preferences, greedy texts."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from mambactl.metrics import columns, group, number
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
    written,
)
from mambactl.report.entries import Entry, against_of

# names of layers that fit below a chart
MOST_TICKS = 18


def students(entries: list[Entry]) -> Iterator[Entry]:
    """Every entry, and behind it the student that it was tested against, as one of its own."""
    known: list[tuple[str, Any]] = [(each.model, each.metrics.get("fidelity")) for each in entries]
    for entry in entries:
        yield entry
        other = present(entry.metrics, "against")
        name = against_of(entry)
        # one that was measured by itself as well needs no second row
        if name and (name, other.get("fidelity")) not in known:
            yield replace(entry, model=name, metrics=dict(other))


def layers(material: Material) -> Section:
    """The error of every new mixer, fed by the teacher."""
    section = Section(
        "layers",
        "Layers",
        "Relative error of each new mixer's output, fed by the teacher; 1 is what a mixer gets "
        "that only puts out the mean.",
    )
    sets: dict[str, list[tuple[Entry, Mapping[str, float]]]] = {}
    for entry in students(material.entries):
        for data, errors in present(entry.metrics, "layers").items():
            sets.setdefault(data, []).append((entry, errors))
    for data, measured in sets.items():
        every = sorted({int(layer) for _, errors in measured for layer in errors})
        places = {layer: place for place, layer in enumerate(every)}
        series = [
            Series(
                entry.model,
                material.colour(entry.model),
                sorted((places[int(layer)], error) for layer, error in errors.items()),
            )
            for entry, errors in measured
        ]
        step = -(-len(every) // MOST_TICKS)
        labels = [str(layer) if place % step == 0 else "" for place, layer in enumerate(every)]
        svg = charts.steps(series, labels, "layer", "relative error")
        title = f"Error by layer, {data}"
        alt = f"Relative error of {len(every)} layers of {len(series)} models"
        cites = [material.cite(section, entry) for entry, _ in measured]
        texts = [
            ((str(layer), *(number(e[str(layer)]) if str(layer) in e else "" for _, e in measured)),
             sorted({n for each in cites for n in each}))
            for layer in every
        ]  # fmt: skip
        table = numbers_of(title, ["layer", *(entry.model for entry, _ in measured)], texts)
        section.figures.append(Figure(title, svg, alt, legend(series), table=table))
    return section


def preferences(material: Material) -> Section:
    """Rewards against the teacher, a table per set."""
    section = Section(
        "preferences",
        "Preferences",
        "Whether the answer that people preferred gains more over the teacher than the other one, "
        "in nats; per token, of answers of other lengths.",
    )
    section.tables += _tables(material, section, "preferences")
    return section


def generation(material: Material) -> Section:
    """How alike greedy texts of student and teacher are."""
    section = Section(
        "generation",
        "Greedy texts",
        "Written behind the same prompts by student and teacher. Forced: the teacher's tokens that "
        "the student would have written next behind the teacher's own text.",
    )
    section.tables += _tables(material, section, "generation")
    return section


def _tables(material: Material, section: Section, kind: str) -> Iterator[Table]:
    sets: dict[str, list[tuple[Entry, Mapping[str, Any]]]] = {}
    for entry in material.entries:
        for name, found in present(entry.metrics, kind).items():
            if isinstance(found, Mapping):
                sets.setdefault(name, []).append((entry, found))
    for name, measured in sets.items():
        shown = columns(group(kind), (found for _, found in measured))
        rows = [
            [Cell(entry.model, number=False), *written(found, shown)] for entry, found in measured
        ]
        cites = [material.cite(section, entry) for entry, _ in measured]
        title = name.capitalize() if name == kind else f"On {name}"
        yield Table(title, ["model", *(each.heading for each in shown)], rows, cites)
