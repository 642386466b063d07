"""Sections about what a model says: fidelity, controls, training, recall, needles."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from mambactl.evaluation.probes import PROBES
from mambactl.evaluation.probes.probe import AGAINST, STUDENT
from mambactl.json_values import AnyObject
from mambactl.metrics import (
    KL,
    Metric,
    columns,
    group,
    percent,
    signed,
    significant,
    span,
)
from mambactl.report import charts
from mambactl.report.charts import Series
from mambactl.report.collect import teachers_of
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
from mambactl.report.details import students
from mambactl.report.entries import Entry, against_of
from mambactl.report.needles import NeedleMap, needle_maps
from mambactl.report.plots import curves
from mambactl.report.summary import (
    CONTROL,
    MODEL,
    Column,
    Row,
    Summary,
    data_set,
    interval,
    summarise,
)

# points of a training curve that a page needs at most
POINTS = 300
# batches whose losses are averaged, and points that a short run keeps at least
SMOOTHED, FEW = 10, 20
MILLION = 1e6
# a control this many times worse makes a linear axis useless
SPREAD = 20


def overview(material: Material) -> Section:
    """One row per model, its controls below it, the teacher and guessing at the end.

    A table for each data set or kind of number, so that none is wider than a page.
    """
    section = Section("summary", "Summary")
    found = summarise(material.entries)
    if not found.columns:
        return section
    section.text = _about_summary(material, found)
    for heading in dict.fromkeys(column.group for column in found.columns):
        own = [column for column in found.columns if column.group == heading]
        rows = [row for row in found.rows if any(column in row.cells for column in own)]
        section.tables.append(
            Table(
                heading[:1].upper() + heading[1:] or "All data sets",
                ["model", *(column.heading for column in own)],
                [_summary_row(found, row, own) for row in rows],
                [material.cite(section, *row.entries) for row in rows],
                kinds=[row.kind for row in rows],
            )
        )
    return section


def _about_summary(material: Material, found: Summary) -> str:
    teachers = teachers_of(material.entries)
    names = f" ({', '.join(teachers)})" if teachers else ""
    text = (
        "Every model, with what it was measured by. KL is in nats per token, to the "
        f"teacher{names}; small figures are intervals, of 95 % unless the command says otherwise; "
        "the best of a column is bold."
    )
    if any(row.kind == CONTROL for row in found.rows):
        text += " Indented below a model: its controls, and what it was tested against."
    if any(column.group == "cache" for column in found.columns):
        text += " The cache of one sequence is computed from shapes."
    return text


def _summary_row(found: Summary, row: Row, columns: Sequence[Column]) -> list[Cell]:
    cells = [Cell(row.name, number=False)]
    for column in columns:
        if (held := row.cells.get(column)) is None:
            cells.append(Cell(""))
            continue
        best = row.kind == MODEL and held.value == found.best(column)
        cells.append(Cell(column.write(held.value), span(held.interval, column.write), best))
    return cells


def faithfulness(material: Material) -> Section:
    """KL over the position in the row, and every number of fidelity."""
    section = section_of(PROBES["fidelity"])
    section.text = f"Token by token on the same text.{_guides(material)} {section.text}"
    sets: dict[str, list[tuple[Entry, AnyObject]]] = {}
    for entry in students(material.entries):
        for name, numbers in present(entry.metrics, "fidelity").items():
            sets.setdefault(data_set(name, numbers), []).append((entry, numbers))
        for name, found in present(entry.metrics, "long_context").items():
            for who in (STUDENT, AGAINST):
                if present(found, who):
                    title = data_set(f"{name} in rows of {found['max_length']:,}", found[who])
                    own = entry if who == STUDENT else replace(entry, model=against_of(entry))
                    sets.setdefault(title, []).append((own, found[who]))
    for data, measured in sets.items():
        section.figures += _by_position(material, section, data, measured)
        numbers = columns(PROBES["fidelity"].metrics, (found for _, found in measured))
        rows = [
            [Cell(entry.model, number=False), *_with_intervals(found, numbers)]
            for entry, found in measured
        ]
        cites = [material.cite(section, entry) for entry, _ in measured]
        headings = ["model", *(each.heading for each in numbers)]
        section.tables.append(Table(f"On {data}", headings, rows, cites))
    section.tables += _paired_tests(material, section)
    return section


def _guides(material: Material) -> str:
    teachers = teachers_of(material.entries)
    if not teachers:
        return ""
    return f" Teacher{'s' if len(teachers) > 1 else ''}: {', '.join(teachers)}."


def _with_intervals(found: AnyObject, numbers: Sequence[Metric]) -> Iterator[Cell]:
    # a table has no room for those of every number
    for cell, each in zip(written(found, numbers), numbers, strict=True):
        bounds = interval(found, each.name) if each.interval else None
        yield replace(cell, note=span(bounds, each.write))


def _paired_tests(material: Material, section: Section) -> Iterator[Table]:
    """Differences from another student on the same documents, with how sure they are."""
    rows, cites = [], []
    for entry in material.entries:
        against = present(entry.metrics, "against")
        other = against_of(entry)
        for data, found in present(against, "tests").items():
            for name, test in present(found, "tests").items():
                texts = (entry.model, other, data, name)
                row = [Cell(text, number=False) for text in texts]
                row.append(Cell(signed(test["difference"])))
                row.append(Cell(span(test.get("interval"), signed)))
                row.append(Cell("" if test.get("p") is None else significant(test["p"])))
                row.append(Cell(f"{test['wins']} / {test['losses']}" if "wins" in test else ""))
                rows.append(row)
                cites.append(material.cite(section, entry))
    if rows:
        headings = ["model", "against", "data", "number", "difference", "interval", "p"]
        headings.append("documents lower / higher")
        yield Table("Paired tests on the same documents", headings, rows, cites)


def _by_position(
    material: Material, section: Section, data: str, measured: list[tuple[Entry, AnyObject]]
) -> Iterator[Figure]:
    buckets = {bucket for _, found in measured for bucket in found.get("by_position", {})}
    labels = sorted(buckets, key=lambda bucket: int(re.findall(r"\d+", bucket)[0]))
    if len(labels) < 2:
        return
    series, rows = [], []
    for entry, found in measured:
        parts = found.get("by_position", {})
        points = [(n, parts[label][KL.name]) for n, label in enumerate(labels) if label in parts]
        bounds = [interval(parts[label], KL.name) for label in labels if label in parts]
        series.append(Series(entry.model, material.colour(entry.model), points, errors=bounds))
        texts = [KL.written(parts[label]) if label in parts else "" for label in labels]
        rows.append(((entry.model, *texts), material.cite(section, entry)))
    title = f"KL by position, {data}"
    svg = charts.steps(series, labels, "tokens before", KL.axis)
    alt = f"KL to the teacher at {len(labels)} ranges of position for {len(series)} models"
    table = numbers_of(title, ["model", *labels], rows)
    yield Figure(title, svg, alt, legend(series), table=table)


def controls(material: Material) -> Section:
    """Every student beside the same layers with something simpler, or with a part taken out."""
    section = Section(
        "controls",
        "Controls",
        "The same text read by the teacher under a short window in the replaced layers (its tokens "
        "+ the first ones of the text), and by the student with a kind of layer putting out zero.",
    )
    sets: dict[str, dict[str, dict[str, tuple[float, Entry]]]] = {}
    for entry in material.entries:
        for name, found in present(entry.metrics, "controls").items():
            for data, numbers in present(found, "fidelity").items():
                student = present(present(entry.metrics, "fidelity"), data).get(KL.name)
                if student is None or numbers.get(KL.name) is None:
                    continue
                title = data_set(data, numbers)
                own = sets.setdefault(title, {}).setdefault(entry.model, {})
                own["student"] = (student, entry)
                own[name] = (numbers[KL.name], entry)
    for data, models in sets.items():
        variants = list(dict.fromkeys(name for own in models.values() for name in own))
        series = [
            Series(
                name,
                index,
                [(own[name][0], row) for row, own in enumerate(models.values()) if name in own],
            )
            for index, name in enumerate(variants)
        ]
        values = [value for own in models.values() for value, _ in own.values() if value > 0]
        spread = bool(values) and max(values) > SPREAD * min(values)
        title = f"Student and controls, {data}"
        svg = charts.dots(series, [charts.folded(m) for m in models], KL.axis, log_x=spread)
        alt = f"KL to the teacher of {len(models)} students and of {len(variants) - 1} controls"
        rows = [
            (
                (model, *(KL.write(own[name][0]) if name in own else "" for name in variants)),
                material.cite(section, *(entry for _, entry in own.values())),
            )
            for model, own in models.items()
        ]
        table = numbers_of(title, ["model", *variants], rows)
        section.figures.append(Figure(title, svg, alt, legend(series), table=table))
    return section


def training(material: Material) -> Section:
    """KL over the tokens trained on, and how the phases went."""
    section = Section("training", "Training")
    series, rows = [], []
    for ledger in material.ledgers:
        kinds = curves(ledger.lines)
        cites = material.cite(section, ledger)
        held, loss = (
            [(tokens / MILLION, value) for tokens, value in points]
            for points in (kinds["held out"], smoothed(kinds["training"]))
        )
        shade = material.colour(ledger.model)
        if loss:
            series.append(Series(ledger.model, shade, loss, faint=True))
        if held:
            series.append(Series(ledger.model, shade, held))
            rows += [((ledger.model, f"{tokens:,.2f}", KL.write(kl)), cites) for tokens, kl in held]
    if series:
        title = "KL over tokens"
        svg = charts.lines(series, "M tokens trained on", KL.axis, log_y=True)
        alt = f"KL to the teacher over the tokens trained on, for {len(legend(series))} runs"
        note = "Marked: held-out text. Thin: the training loss, averaged over neighbouring batches."
        if (
            len(
                {
                    line.get("eval_tokens")
                    for each in material.ledgers
                    for line in each.lines
                    if KL.name in line
                }
            )
            > 1
        ):
            note += " The held-out text is not the same in all runs."
        table = numbers_of("Held-out KL", ["model", "M tokens", "KL"], rows) if rows else None
        section.figures.append(Figure(title, svg, alt, legend(series), note, table))
    found = [
        (entry, phase, numbers)
        for entry in material.entries
        for phase, numbers in present(entry.metrics, "training").items()
        if isinstance(numbers, Mapping)
    ]
    if found:
        numbers = columns(group("training"), (each for *_, each in found))
        headings = ["model", "phase", *(each.heading for each in numbers)]
        cells = [
            [Cell(entry.model, number=False), Cell(phase, number=False), *written(each, numbers)]
            for entry, phase, each in found
        ]
        cites = [material.cite(section, entry) for entry, *_ in found]
        section.tables.append(Table("Phases", headings, cells, cites))
    return section


def smoothed(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Means of as many neighbours as leave at most POINTS points; single batches say little.

    A value that is no number is left out of its mean.
    """
    size = max(1, -(-len(points) // POINTS), min(SMOOTHED, len(points) // FEW))
    found = []
    for start in range(0, len(points), size):
        near = points[start : start + size]
        values = [value for _, value in near if math.isfinite(value)]
        if values:
            found.append((near[-1][0], sum(values) / len(values)))
    return found


def recall(material: Material) -> Section:
    """Recall over the length of the row, a chart per form, with the teacher and a guess."""
    section = section_of(PROBES["recall"])
    found = summarise(material.entries)
    forms: dict[str, list[tuple[int, Column]]] = {}
    for column in found.columns:
        parts = re.fullmatch(r"(\w+)-(\d{1,9})", column.heading)
        if column.group == "recall" and parts:
            forms.setdefault(parts[1], []).append((int(parts[2]), column))
    for form, lengths in forms.items():
        lengths.sort(key=lambda pair: pair[0])
        rows = [
            row
            for row in found.rows
            if row.kind != CONTROL and any(column in row.cells for _, column in lengths)
        ]
        title = f"Recall, {form}"
        texts = [
            (
                (
                    row.name,
                    *(c.write(row.cells[c].value) if c in row.cells else "" for _, c in lengths),
                ),
                material.cite(section, *_with(row, "recall")),
            )
            for row in rows
        ]
        table = numbers_of(title, ["model", *(f"{n:,} tokens" for n, _ in lengths)], texts)
        if len(lengths) < 2:
            section.tables.append(table)
            continue
        series = [
            Series(
                row.name,
                material.colour(row.name) if row.kind == MODEL else charts.NEUTRAL,
                [(n, 100 * row.cells[c].value) for n, c in lengths if c in row.cells],
                {"teacher": "dashed", "guessing": "dotted"}.get(row.name.split()[0], "solid"),
            )
            for row in rows
        ]
        svg = charts.lines(series, "tokens in the row", "recalled, %", log_x=True)
        alt = f"Share of values recalled over the length of the row by {len(series)} models"
        ends = any(row.kind != MODEL for row in rows)
        note = "Dashed: the teacher. Dotted: guessing." if ends else ""
        section.figures.append(Figure(title, svg, alt, legend(series), note, table))
    return section


def _with(row: Row, kind: str) -> list[Entry]:
    return [entry for entry in row.entries if present(entry.metrics, kind)]


def needle(material: Material) -> Section:
    """Heat maps of what is found at a depth of a context of a length."""
    section = section_of(PROBES["needle"])
    teachers: list[NeedleMap] = []
    for entry in material.entries:
        for found in needle_maps(entry.metrics.get("needle")):
            who, _, what = found.name.partition(" ")
            owner = against_of(entry) if who == AGAINST else entry.model
            what = what if who in (STUDENT, AGAINST) else found.name
            title = f"{owner} {what}".strip()
            if found.name.startswith("teacher"):
                # every student's results hold those of their teacher
                if found in teachers:
                    continue
                teachers.append(found)
                name = entry.metrics.get("teacher")
                title = f"teacher {name} {what.partition(' ')[2]}" if name else found.name
            scale = 100 if max(found.depths) <= 1 else 1
            columns = [f"{scale * depth:.0f} %" for depth in found.depths]
            rows = [charts.short(length) for length in found.lengths]
            # signs after every number would touch each other below ten columns
            depths = [f"{scale * depth:.0f}" for depth in found.depths]
            svg = charts.heat(found.shares, rows, depths, "depth of the needle, %", "tokens")
            alt = f"{title}: {len(columns)} depths of {len(rows)} lengths"
            cites = material.cite(section, entry)
            texts = [
                ((f"{n:,}", *map(percent, row)), cites)
                for n, row in zip(found.lengths, found.shares, strict=True)
            ]
            table = numbers_of(title, ["tokens", *columns], texts)
            section.figures.append(Figure(title, svg, alt, table=table))
    return section
