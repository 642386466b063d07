"""Sections about how fast a model runs and what it holds: throughput, memory, drafts, benches."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from mambactl import metrics
from mambactl.json_values import AnyObject
from mambactl.metrics import Metric
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
from mambactl.report.entries import Entry

# curves of a chart, and how their lines are drawn
RATES = {
    metrics.DECODE_RATE: "solid",
    metrics.DRAFTED_RATE: "dashed",
    metrics.DECODE_LIMIT: "dotted",
}
DRAFT = "draft"
# the type of caches that are computed from a checkpoint
AS_STORED = "as stored"
# rates this far apart need a logarithmic axis
SPREAD = 20
LINES = {
    "solid": "Solid: plain decoding.",
    "dashed": "Dashed: with a draft.",
    "dotted": "Dotted: the byte limit of plain decoding.",
}
# parts that are measured on their own: group of numbers, caption
PARTS = {
    "kernels": "The recurrent kernel of one layer",
    "loss": "Distillation loss through the head",
    "steps": "Training steps",
}


@dataclass(frozen=True)
class Point:
    """A measured point, the model it is about, and where it was measured."""

    model: str
    entry: Entry
    numbers: AnyObject

    @property
    def machine(self) -> str:
        """Device and type of the weights."""
        about = (self.entry.about.get("device"), self.entry.metrics.get("dtype"))
        return ", ".join(str(part) for part in about if part)


def _points(material: Material) -> Iterator[Point]:
    """Points of decoding, of every model and of its baseline."""
    for entry in material.entries:
        baseline = str(entry.metrics.get("baseline") or "")
        names = present(entry.metrics, "config").get("synthetic") or []
        for kind, name in (("points", entry.model), ("baseline_points", baseline)):
            for point in entry.metrics.get(kind) or []:
                if point.get(metrics.DECODE_RATE.name) is not None:
                    own = point.get("model") if len(names) > 1 else None
                    yield Point(own or name, entry, point)


def throughput(material: Material) -> Section:
    """Tokens per second over context and over batch, and every measured point."""
    section = Section("speed", "Speed", "New tokens per second of all rows together.")
    points = list(_points(material))
    for machine in dict.fromkeys(point.machine for point in points):
        here = [point for point in points if point.machine == machine]
        for over, fixed, axis in (
            (metrics.CONTEXT, metrics.ROWS, "tokens of context"),
            (metrics.ROWS, metrics.CONTEXT, "rows decoded together"),
        ):
            section.figures += _rates(material, section, here, machine, over, fixed, axis)
    columns = metrics.columns(metrics.group("speed"), (point.numbers for point in points))
    if points:
        drafted = [DRAFT] if any(_draft(point) for point in points) else []
        rows = [
            [
                Cell(point.model, number=False),
                *(Cell(_draft(point), number=False) for _ in drafted),
                *written(point.numbers, columns),
            ]
            for point in points
        ]
        cites = [material.cite(section, point.entry) for point in points]
        machines = "; ".join(dict.fromkeys(filter(None, (point.machine for point in points))))
        caption = f"Every measured point, on {machines}" if machines else "Every measured point"
        headings = ["model", *drafted, *(each.heading for each in columns)]
        section.tables.append(Table(caption, headings, rows, cites))
    return section


def _draft(point: Point) -> str:
    config = present(point.entry.metrics, "config")
    used = metrics.DRAFTED_RATE.name in point.numbers
    return metrics.last_part(str(config.get("draft") or "")) if used else ""


def _rates(
    material: Material,
    section: Section,
    points: list[Point],
    machine: str,
    over: Metric,
    fixed: Metric,
    axis: str,
) -> Iterator[Figure]:
    """A chart per value of `fixed` at which some model was measured at two values of `over`."""
    for value in sorted({point.numbers[fixed.name] for point in points}):
        own = [point for point in points if point.numbers[fixed.name] == value]
        own.sort(key=lambda point: point.numbers[over.name])
        series = []
        for model in dict.fromkeys(point.model for point in own):
            for rate, line in RATES.items():
                pairs = {
                    p.numbers[over.name]: p.numbers[rate.name]
                    for p in own
                    if p.model == model and p.numbers.get(rate.name) is not None
                }
                if len(pairs) > 1:
                    shade = material.colour(model)
                    series.append(Series(model, shade, list(pairs.items()), line))
        if not series:
            continue
        names = {metrics.ROWS: "batch", metrics.CONTEXT: "context"}
        title = f"Tokens/s over {names[over]}"
        title += f", {names[fixed]} {value:,}" + (f", {machine}" if machine else "")
        values = [y for each in series for _, y in each.points]
        far = max(values) > SPREAD * min(values)
        svg = charts.lines(series, axis, "tokens/s", log_x=True, log_y=far)
        alt = f"{title} for {len(legend(series))} models"
        rows = [
            (
                (point.model, f"{point.numbers[over.name]:,}", *_tenths(point.numbers)),
                material.cite(section, point.entry),
            )
            for point in own
        ]
        table = numbers_of(title, ["model", axis, "plain", "with a draft", "byte limit"], rows)
        drawn = {each.line for each in series}
        note = " ".join(text for line, text in LINES.items() if line in drawn and len(drawn) > 1)
        yield Figure(title, svg, alt, legend(series), note, table)


def _tenths(numbers: AnyObject) -> Iterator[str]:
    for each in RATES:
        yield replace(each, write=metrics.grouped_tenths).written(numbers)


@dataclass
class _Caches:
    """Bytes of one sequence by its length, of one model in one type."""

    entries: list[Entry] = field(default_factory=list)
    sizes: dict[int, float] = field(default_factory=dict)
    computed: bool = False


def memory(material: Material) -> Section:
    """Cache of one sequence over its length, measured, or from the checkpoint's shapes.

    A chart for each type of the numbers: caches of two types are not to be compared.
    """
    section = Section("memory", "Memory")
    for dtype, models in _caches(material).items():
        if len({length for each in models.values() for length in each.sizes}) > 1:
            section.figures.append(_cache_figure(material, section, dtype, models))
    return section


def _caches(material: Material) -> dict[str, dict[str, _Caches]]:
    """Cache sizes of every model, by number type, then by model."""
    found: dict[str, dict[str, _Caches]] = {}
    for point in _points(material):
        if (size := point.numbers.get(metrics.CACHE.name)) is not None:
            dtype = str(point.entry.metrics.get("dtype") or "")
            own = found.setdefault(dtype, {}).setdefault(point.model, _Caches())
            own.sizes[point.numbers[metrics.CONTEXT.name]] = size / point.numbers[metrics.ROWS.name]
            own.entries.append(point.entry)
    measured = {model for models in found.values() for model in models}
    for entry in material.entries:
        cache = present(present(entry.about, "model"), "cache")
        if cache and entry.model not in measured:
            sizes = {
                length: cache["bytes_per_sequence"] + length * cache["bytes_per_token"]
                for length in (128, 1024, 8192, 32768, 131072)
            }
            found.setdefault(AS_STORED, {})[entry.model] = _Caches([entry], sizes, computed=True)
    return found


def _cache_figure(
    material: Material, section: Section, dtype: str, models: Mapping[str, _Caches]
) -> Figure:
    series = [
        Series(
            model,
            material.colour(model),
            [(length, size / 2**20) for length, size in sorted(each.sizes.items())],
            "dashed" if each.computed else "solid",
        )
        for model, each in models.items()
    ]
    title = "Cache of one sequence over its length" + (f", {dtype}" if dtype else "")
    svg = charts.lines(series, "tokens of context", "MiB", log_x=True, log_y=True)
    rows = [
        ((model, f"{length:,}", metrics.mebibytes(size)), material.cite(section, *each.entries))
        for model, each in models.items()
        for length, size in sorted(each.sizes.items())
    ]
    table = numbers_of(title, ["model", "tokens", "MiB"], rows)
    alt = f"Cache in MiB over the tokens of context for {len(series)} models"
    computed = any(each.computed for each in models.values())
    note = "Dashed: computed from the shapes of the checkpoint." if computed else ""
    return Figure(title, svg, alt, legend(series), note, table)


def drafts(material: Material) -> Section:
    """Table of speculative decoding, with the drafted tokens that its steps kept."""
    section = Section(
        "drafts", "Speculative decoding", "Real prompts, decoded plainly and with a draft."
    )
    found = [entry for entry in material.entries if present(entry.metrics, "speculative")]
    if not found:
        return section
    columns = metrics.group("drafts")
    rows = [[Cell(entry.model, number=False), *written(entry.metrics, columns)] for entry in found]
    cites = [material.cite(section, entry) for entry in found]
    headings = ["target", *(each.heading for each in columns)]
    section.tables.append(Table("Against plain decoding", headings, rows, cites))
    for entry in found:
        counts = present(entry.metrics["speculative"], "accepted_histogram")
        kept = {int(n): times for n, times in sorted(counts.items(), key=lambda pair: int(pair[0]))}
        if not sum(kept.values()):
            continue
        draft = metrics.last_part(str(entry.metrics.get("draft", "")))
        title = f"Accepted tokens a step: {entry.model} with {draft}"
        svg = charts.histogram(kept, material.colour(entry.model), "accepted", "steps")
        alt = f"Shares of steps that kept {min(kept)} to {max(kept)} drafted tokens"
        cites = material.cite(section, entry)
        rows = [((str(n), f"{times:,}"), cites) for n, times in kept.items()]
        table = numbers_of(title, ["accepted", "steps"], rows)
        section.figures.append(Figure(title, svg, alt, table=table))
    return section


def benches(material: Material) -> Section:
    """Kernels, the loss through the head, and training steps, each measured on its own."""
    section = Section("benches", "Parts measured on their own")
    for entry in material.entries:
        rows = entry.metrics.get("points") or []
        steps = [r for r in rows if "stage" in r and metrics.MILLISECONDS.name in r]
        loss = [entry.metrics["loss"]] if present(entry.metrics, "loss") else []
        parts = {"kernels": entry.metrics.get("kernels") or [], "loss": loss, "steps": steps}
        for part, caption in PARTS.items():
            found = parts[part]
            if not isinstance(found, list) or not found:
                continue
            where = filter(None, (entry.about.get("device"), entry.metrics.get("dtype")))
            columns = metrics.group(part)
            cells = [
                [Cell(row.get("model", entry.model), number=False), *written(row, columns)]
                for row in found
            ]
            cites = [material.cite(section, entry)] * len(found)
            headings = ["", *(each.heading for each in columns)]
            section.tables.append(Table(f"{caption}, {', '.join(where)}", headings, cells, cites))
    return section
