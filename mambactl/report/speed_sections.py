"""Sections about how fast a model runs and what it holds: throughput, memory, drafts, benches."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mambactl.report import charts
from mambactl.report.bench_table import NUMBERS
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
from mambactl.report.summary import mebibytes, number, percent

SPEEDS = (
    ("prefill tok/s", "prefill_tokens_per_second", "{:,.0f}".format),
    *NUMBERS,
    ("of the limit", "speculative_share", percent),
    ("accepted", "acceptance", percent),
    ("cache MiB", "cache_bytes", mebibytes),
    ("peak MiB", "peak_bytes", mebibytes),
    ("decode gain", "decode_speedup", "{:.2f}x".format),
    ("cache gain", "cache_reduction", "{:.2f}x".format),
)
# curve of a chart: key of a point, how its line is drawn
RATES = (
    ("decode_tokens_per_second", "solid"),
    ("speculative_tokens_per_second", "dashed"),
    ("decode_byte_limit", "dotted"),
)
DRAFT = "draft"
# rates this far apart need a logarithmic axis
SPREAD = 20
LINES = {
    "solid": "Solid: plain decoding.",
    "dashed": "Dashed: with a draft.",
    "dotted": "Dotted: the byte limit of plain decoding.",
}
DRAFTS = (
    ("draft", "draft", lambda name: name.rpartition("/")[2]),
    ("K", "k", str),
    ("accepted", "acceptance", percent),
    ("tokens/step", "tokens_per_step", "{:.2f}".format),
    ("tok/s", "tokens_per_second", "{:,.1f}".format),
    ("plain tok/s", "plain_tokens_per_second", "{:,.1f}".format),
    ("speed-up", "speedup", "{:.2f}x".format),
    ("same tokens", "identical", lambda same: "yes" if same else "no"),
)
KERNELS = (
    ("rows", "batch_size", str),
    ("replay us", "fused_microseconds", "{:.1f}".format),
    ("state per token us", "snapshots_microseconds", "{:.1f}".format),
    ("ratio", "ratio", "{:.2f}x".format),
    ("error", "error", "{:.1e}".format),
)
LOSS = (
    ("tokens", "tokens", "{:,}".format),
    ("hidden", "hidden", "{:,}".format),
    ("vocabulary", "vocab", "{:,}".format),
    ("ms", "milliseconds", "{:.2f}".format),
    ("FLOP/s", "flops_per_second", "{:.3g}".format),
    ("MiB beyond", "peak_bytes", mebibytes),
    ("error", "error_value", "{:.1e}".format),
)
STEPS = (
    ("stage", "stage", str),
    ("rows", "batch_size", str),
    ("tokens per row", "input_len", "{:,}".format),
    ("tok/s", "tokens_per_second", "{:,.0f}".format),
    ("ms", "milliseconds", "{:.1f}".format),
    ("peak MiB", "peak_bytes", mebibytes),
    ("first loss", "first_loss", number),
    ("last loss", "last_loss", number),
)


@dataclass(frozen=True)
class Point:
    """A measured point, the model it is about, and where it was measured."""

    model: str
    entry: Entry
    numbers: Mapping[str, Any]

    @property
    def place(self) -> str:
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
                if point.get("decode_tokens_per_second") is not None:
                    own = point.get("model") if len(names) > 1 else None
                    yield Point(own or name, entry, point)


def throughput(material: Material) -> Section:
    """Tokens per second over context and over batch, and every measured point."""
    section = Section("speed", "Speed", "New tokens per second of all rows together.")
    points = list(_points(material))
    for place in dict.fromkeys(point.place for point in points):
        here = [point for point in points if point.place == place]
        for over, fixed, axis in (
            ("input_len", "batch_size", "tokens of context"),
            ("batch_size", "input_len", "rows decoded together"),
        ):
            section.figures += _rates(material, section, here, place, over, fixed, axis)
    columns = [each for each in SPEEDS if any(each[1] in point.numbers for point in points)]
    if points:
        drafted = [DRAFT] if any(_draft(point) for point in points) else []
        rows = [
            [Cell(point.model, number=False),
             *(Cell(_draft(point), number=False) for _ in drafted),
             *written(point.numbers, columns)]
            for point in points
        ]  # fmt: skip
        cites = [material.cite(section, point.entry) for point in points]
        places = "; ".join(dict.fromkeys(filter(None, (point.place for point in points))))
        caption = f"Every measured point, on {places}" if places else "Every measured point"
        headings = ["model", *drafted, *(heading for heading, _, _ in columns)]
        section.tables.append(Table(caption, headings, rows, cites))
    return section


def _draft(point: Point) -> str:
    config = present(point.entry.metrics, "config")
    used = "speculative_tokens_per_second" in point.numbers
    return str(config.get("draft") or "").rpartition("/")[2] if used else ""


def _rates(
    material: Material,
    section: Section,
    points: list[Point],
    place: str,
    over: str,
    fixed: str,
    axis: str,
) -> Iterator[Figure]:
    """A chart per value of `fixed` at which some model was measured at two values of `over`."""
    for value in sorted({point.numbers[fixed] for point in points}):
        own = [point for point in points if point.numbers[fixed] == value]
        own.sort(key=lambda point: point.numbers[over])
        series = []
        for model in dict.fromkeys(point.model for point in own):
            for key, line in RATES:
                pairs = {p.numbers[over]: p.numbers[key] for p in own
                         if p.model == model and p.numbers.get(key) is not None}  # fmt: skip
                if len(pairs) > 1:
                    shade = material.colour(model)
                    series.append(Series(model, shade, list(pairs.items()), line))
        if not series:
            continue
        name = "batch" if fixed == "batch_size" else "context"
        title = f"Tokens/s over {axis.split()[-1] if over == 'input_len' else 'batch'}"
        title += f", {name} {value:,}" + (f", {place}" if place else "")
        values = [y for each in series for _, y in each.points]
        far = max(values) > SPREAD * min(values)
        svg = charts.lines(series, axis, "tokens/s", log_x=True, log_y=far)
        alt = f"{title} for {len(legend(series))} models"
        rows = [
            ((point.model, f"{point.numbers[over]:,}", *(c.text for c in written(
                point.numbers, [("", key, "{:,.1f}".format) for key, _ in RATES]))),
             material.cite(section, point.entry))
            for point in own
        ]  # fmt: skip
        table = numbers_of(title, ["model", axis, "plain", "with a draft", "byte limit"], rows)
        drawn = {each.line for each in series}
        note = " ".join(text for line, text in LINES.items() if line in drawn and len(drawn) > 1)
        yield Figure(title, svg, alt, legend(series), note, table)


def memory(material: Material) -> Section:
    """Cache of one sequence over its length, measured, or from the checkpoint's shapes."""
    section = Section("memory", "Memory")
    measured: dict[str, dict[int, float]] = {}
    entries: dict[str, list[Entry]] = {}
    for point in _points(material):
        if point.numbers.get("cache_bytes") is not None:
            sizes = measured.setdefault(point.model, {})
            sizes[point.numbers["input_len"]] = (
                point.numbers["cache_bytes"] / point.numbers["batch_size"]
            )
            entries.setdefault(point.model, []).append(point.entry)
    computed = []
    for entry in material.entries:
        cache = present(present(entry.about, "model"), "cache")
        if cache and entry.model not in measured:
            computed.append(entry.model)
            entries[entry.model] = [entry]
            measured[entry.model] = {
                length: cache["bytes_per_sequence"] + length * cache["bytes_per_token"]
                for length in (128, 1024, 8192, 32768, 131072)
            }
    lengths = {length for sizes in measured.values() for length in sizes}
    if len(lengths) < 2:
        return section
    series = [
        Series(model, material.colour(model),
               [(length, size / 2**20) for length, size in sorted(sizes.items())],
               "dashed" if model in computed else "solid")
        for model, sizes in measured.items()
    ]  # fmt: skip
    title = "Cache of one sequence over its length"
    svg = charts.lines(series, "tokens of context", "MiB", log_x=True, log_y=True)
    rows = [
        ((model, f"{length:,}", mebibytes(size)), material.cite(section, *entries[model]))
        for model, sizes in measured.items()
        for length, size in sorted(sizes.items())
    ]
    note = "Solid: measured. Dashed: computed from the shapes of the checkpoint."
    table = numbers_of(title, ["model", "tokens", "MiB"], rows)
    alt = f"Cache in MiB over the tokens of context for {len(series)} models"
    section.figures.append(Figure(title, svg, alt, legend(series), note if computed else "", table))
    return section


def drafts(material: Material) -> Section:
    """What speculative decoding came to, and how many drafted tokens its steps kept."""
    section = Section(
        "drafts", "Speculative decoding", "Real prompts, decoded plainly and with a draft."
    )
    found = [entry for entry in material.entries if present(entry.metrics, "speculative")]
    if not found:
        return section
    rows = [[Cell(entry.model, number=False), *written(entry.metrics, DRAFTS)] for entry in found]
    cites = [material.cite(section, entry) for entry in found]
    headings = ["target", *(heading for heading, _, _ in DRAFTS)]
    section.tables.append(Table("Against plain decoding", headings, rows, cites))
    for entry in found:
        counts = present(entry.metrics["speculative"], "accepted_histogram")
        kept = {int(n): times for n, times in sorted(counts.items(), key=lambda pair: int(pair[0]))}
        if not sum(kept.values()):
            continue
        draft = str(entry.metrics.get("draft", "")).rpartition("/")[2]
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
        metrics = entry.metrics
        rows = metrics.get("points") or []
        steps = [row for row in rows if "stage" in row and "milliseconds" in row]
        loss = [metrics["loss"]] if present(metrics, "loss") else []
        for caption, columns, found in (
            ("The recurrent kernel of one layer", KERNELS, metrics.get("kernels") or []),
            ("Distillation loss through the head", LOSS, loss),
            ("Training steps", STEPS, steps),
        ):
            if not isinstance(found, list) or not found:
                continue
            where = ", ".join(filter(None, (entry.about.get("device"), metrics.get("dtype"))))
            cells = [[Cell(row.get("model", entry.model), number=False), *written(row, columns)]
                     for row in found]  # fmt: skip
            cites = [material.cite(section, entry)] * len(found)
            headings = ["", *(heading for heading, _, _ in columns)]
            section.tables.append(Table(f"{caption}, {where}", headings, cells, cites))
    return section
