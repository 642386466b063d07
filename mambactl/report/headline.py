"""The first screen of a page: what was kept of the teacher and what was won, in a sentence, a
picture, a table with the teacher's row, and texts of both.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from mambactl import metrics
from mambactl.evaluation.probes.agreement_probe import SAMPLES
from mambactl.evaluation.sequences import CACHE, SEQUENCES
from mambactl.metrics import AGREEMENT, MEAN_RECALL_RATIO, SHARE, percent, times
from mambactl.report import charts
from mambactl.report.charts import Series
from mambactl.report.content import Cell, Figure, Material, Section, Table, legend, present
from mambactl.report.entries import Entry

KEY, TITLE = "kept", "What was kept and what was won"
WHOLE = 1.0
# what labels begin with, in the order of the page
KINDS = (AGREEMENT.name, "recall", "cache", "decoding")
# bytes of a student's cache and of its teacher's
TOTALS = tuple(each.name for each in metrics.METRICS["sequence"][:2])
# students beyond which a sentence names no single one
NAMED = 1


@dataclass(frozen=True)
class Measure:
    """One number beside the teacher's: `share` of it, and both as text."""

    label: str
    share: float
    own: str
    theirs: str
    phrase: str


@dataclass
class Student:
    """A model with what it keeps of its teacher, and the entries that say so."""

    name: str
    measures: dict[str, Measure] = field(default_factory=dict)
    entries: list[Entry] = field(default_factory=list)
    teacher: str = ""


def kept_and_won(material: Material) -> Section:
    """The section, empty where no model was measured beside a teacher."""
    section = Section(KEY, TITLE)
    students = [student for student in _students(material) if student.measures]
    if not students:
        return section
    found = dict.fromkeys(label for each in students for label in each.measures)
    labels = sorted(found, key=lambda label: KINDS.index(label.partition(",")[0]))
    for each in students:
        each.measures = {name: each.measures[name] for name in labels if name in each.measures}
    section.text = _sentence(students, labels)
    section.figures.append(_picture(material, students, labels))
    section.tables.append(_glance(material, section, students, labels))
    section.tables += _samples(material, section)
    return section


def _students(material: Material) -> list[Student]:
    found: dict[str, Student] = {}
    for entry in material.entries:
        student = found.setdefault(entry.model, Student(entry.model))
        measures = list(_measures(entry))
        if measures:
            student.entries.append(entry)
            student.teacher = student.teacher or str(
                entry.metrics.get("teacher") or entry.metrics.get("baseline") or ""
            )
        for measure in measures:
            student.measures.setdefault(measure.label, measure)
    return list(found.values())


def _measures(entry: Entry) -> Iterator[Measure]:
    for make in (_agreement, _recall, _cache, _speed):
        found = make(entry)
        if found is not None:
            yield found


def _agreement(entry: Entry) -> Measure | None:
    for numbers in present(entry.metrics, "fidelity").values():
        value = numbers.get(AGREEMENT.name) if isinstance(numbers, Mapping) else None
        if value is not None:
            where = f" of {numbers['tokens']:,} positions" if numbers.get("tokens") else ""
            phrase = f"names the teacher's likeliest next token in {percent(value)}{where}"
            return Measure(AGREEMENT.name, value, percent(value), percent(WHOLE), phrase)
    return None


def _recall(entry: Entry) -> Measure | None:
    value = present(present(entry.metrics, "recall"), "recall").get(MEAN_RECALL_RATIO.name)
    if value is None:
        return None
    phrase = f"recalls {percent(value)} of what the teacher recalls"
    return Measure("recall", value, percent(value), percent(WHOLE), phrase)


def _cache(entry: Entry) -> Measure | None:
    sequences = present(present(entry.metrics, CACHE), SEQUENCES)
    known = [n for n, sizes in sequences.items() if sizes.get(SHARE.name) is not None]
    if not known:
        return None
    longest = max(known, key=int)
    sizes = sequences[longest]
    label = f"cache, {int(longest):,} tokens"
    unit = " ".join(filter(None, ("MiB", str(present(entry.metrics, CACHE).get("dtype") or ""))))
    own, theirs = (f"{metrics.mebibytes(sizes[key])} {unit}" for key in TOTALS)
    phrase = f"needs {percent(sizes[SHARE.name])} of its cache at {int(longest):,} tokens"
    return Measure(label, sizes[SHARE.name], own, theirs, phrase)


def _speed(entry: Entry) -> Measure | None:
    """Plain decoding of one row behind the longest context that both were timed at."""
    rate = metrics.DECODE_RATE.name
    timed = []
    for kind in ("points", "baseline_points"):
        points = entry.metrics.get(kind)
        own = {
            point[metrics.CONTEXT.name]: point[rate]
            for point in points or ()
            if point.get(metrics.ROWS.name) == 1 and point.get(rate)
        }
        timed.append(own)
    ours, theirs = timed
    shared = ours.keys() & theirs.keys()
    if not shared:
        return None
    context = max(shared)
    gain = ours[context] / theirs[context]
    known = (entry.about.get("device"), entry.metrics.get("dtype"), entry.about.get("date"))
    where = ", ".join(str(each) for each in known if each)
    phrase = f"decodes at {times(gain)} its speed behind {context:,} tokens"
    phrase += f" (kept result: {where})" if where else " (kept result)"
    mine, teachers = (f"{metrics.rate(speed[context])} tokens/s" for speed in (ours, theirs))
    return Measure(f"decoding, {context:,} tokens", gain, mine, teachers, phrase)


def _sentence(students: Sequence[Student], labels: Sequence[str]) -> str:
    if len(students) <= NAMED:
        (only,) = students
        parts = [measure.phrase for measure in only.measures.values()]
        return f"{only.name} {_listed(parts)}."
    parts = []
    for label in labels:
        shares = [s.measures[label].share for s in students if label in s.measures]
        low, high = percent(min(shares)), percent(max(shares))
        parts.append(f"{label} {low}" if low == high else f"{label} {low} to {high}")
    return f"{len(students)} models, each beside its teacher (100 %): {_listed(parts)}."


def _listed(parts: Sequence[str]) -> str:
    *most, last = parts
    return f"{', '.join(most)} and {last}" if most else last


def _picture(material: Material, students: Sequence[Student], labels: Sequence[str]) -> Figure:
    series = [
        Series(
            each.name,
            material.colour(each.name),
            [
                (100 * each.measures[label].share, row)
                for row, label in enumerate(labels)
                if label in each.measures
            ],
        )
        for each in students
    ]
    height = 0.8 + 0.62 * len(labels)
    svg = charts.dots(series, list(labels), "% of the teacher's", mark=100, height=height)
    alt = f"{', '.join(labels)} of {len(students)} models as a share of the teacher's"
    note = "Dashed: the teacher. Agreement and recall are better to the right, a cache to the left."
    if any(label.startswith("decoding") for label in labels):
        note += " Speeds are kept results of the machine that is named, not measured for this page."
    return Figure("Beside the teacher", svg, alt, legend(series), note)


def _glance(
    material: Material, section: Section, students: Sequence[Student], labels: Sequence[str]
) -> Table:
    rows, cites, kinds = [], [], []
    for each in students:
        cells = [each.measures[name].own if name in each.measures else "" for name in labels]
        rows.append([Cell(each.name, number=False), *map(Cell, cells)])
        cites.append(material.cite(section, *each.entries))
        kinds.append("model")
    for teacher in dict.fromkeys(each.teacher for each in students):
        own = [each for each in students if each.teacher == teacher]
        cells = [
            " / ".join(dict.fromkeys(s.measures[name].theirs for s in own if name in s.measures))
            for name in labels
        ]
        rows.append([Cell(f"teacher {teacher}".strip(), number=False), *map(Cell, cells)])
        cites.append(material.cite(section, *(entry for each in own for entry in each.entries)))
        kinds.append("reference")
    return Table("At a glance", ["model", *labels], rows, cites, kinds=kinds)


def _samples(material: Material, section: Section) -> Iterator[Table]:
    rows: list[list[Cell]] = []
    cites = []
    for entry in material.entries:
        for numbers in present(entry.metrics, "generation").values():
            texts: object = numbers.get(SAMPLES) if isinstance(numbers, Mapping) else None
            for one in texts or ():
                cells = (entry.model, one["prompt"], one["student"], one["teacher"])
                rows.append([Cell(text, number=False) for text in cells])
                cites.append(material.cite(section, entry))
    if rows:
        yield Table(
            "The same prompts, continued greedily by both",
            ["model", "prompt", "student", "teacher"],
            rows,
            cites,
        )
