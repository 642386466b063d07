"""Sections about how a student differs from its teacher: layers, preferences, greedy texts."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from mambactl.evaluation.probes import PROBES
from mambactl.evaluation.probes.probe import Probe
from mambactl.metrics import columns, number
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
    section = section_of(PROBES["layers"])
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


def numbers(probe: Probe[Any, Any, Any], material: Material) -> Section:
    """What a probe without charts of its own has found: a table per data set."""
    section = section_of(probe)
    section.tables += _tables(material, section, probe)
    return section


def _tables(material: Material, section: Section, probe: Probe[Any, Any, Any]) -> Iterator[Table]:
    sets: dict[str, list[tuple[Entry, Mapping[str, Any]]]] = {}
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
