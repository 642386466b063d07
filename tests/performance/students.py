"""Quality that students keep over the size of their cache: one table of several `eval --json`.

    mambactl eval s.st --data held-out.jsonl --recall 256,1024,2048 --recall-rows 256 \
        --needle 512,1024,2048,4096,8192 --needle-depths 20 --needle-texts 3 \
        --needle-scoring argmax --control window --ablate recurrent --json > s.json
    python -m tests.performance.students "50 %=s.json" "50 %=s-tasks.json" "25 %=q.json" -o all.json

Every FILE is what `eval --json` printed, or what a checkpoint keeps in its results; files with one
NAME are about one student, as are the students in a file that -o wrote. The table (Markdown, a
column per student) is on stdout. -o writes the numbers behind it, without those of single
documents, as `mambactl report` reads them. --figure draws KL and recall over the bytes of the
cache, and a curve through the best student of about each size; the picture of the README is

    python -m tests.performance.students recipes/results/smollm2-135m-students-h200.json \
        --figure recipes/results/smollm2-135m-students-h200.png
"""

import json
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mambactl.bounds import MIB
from mambactl.errors import UsageError
from mambactl.figures import new_figure
from mambactl.files import NAMED_FILE, explained, replacing
from mambactl.metrics import (
    AGREEMENT,
    KL,
    LEAST_RECALL_RATIO,
    MEAN_RECALL_RATIO,
    NEEDLE_RATIO,
    PERPLEXITY_RATIO,
    RECALL_RATIO,
    RETRIEVED,
    SHARE,
    Metric,
    count,
    hundredths,
    markdown_row,
    percent,
    span,
)
from mambactl.report.entries import Entry, read_entries
from mambactl.stage_result import StageResult
from tests.performance import command

PARSER = ArgumentParser("python -m tests.performance.students", description=__doc__.splitlines()[0])
PARSER.add_argument("files", nargs="+", metavar="[NAME=]FILE", help="JSON of eval")
PARSER.add_argument("-o", "--out", help="also write the numbers to this file (JSON)")
PARSER.add_argument("--about", default="", help="a sentence about the runs, for that file")
PARSER.add_argument("--figure", help="also draw KL and recall over cache into this file (PNG)")
PARSER.set_defaults(json=False)

MEAN_NEEDLE_RATIO = f"mean_{NEEDLE_RATIO.name}"
WINDOW, ABLATED = "window ", "no recurrent"
# numbers of every document or row, which a table has no use for
SAMPLES = "samples"
# tokens of the sequence whose cache is drawn, or the nearest that was counted; inches of a figure
DRAWN_LENGTH, INCHES = 8192, (9.4, 3.6)
# caches that differ by less are drawn as one size
NEAR = 1.1
# per inch: a README is read at this size
PIXELS = 100
# facts about a run, beside its numbers
ABOUT = ("checkpoint", "created", "date", "device", "version", "versions", "command")


@dataclass
class Student:
    """Everything that is known of one student, and of the runs that measured it."""

    name: str
    metrics: dict[str, Any] = field(default_factory=dict)
    runs: list[dict[str, Any]] = field(default_factory=list)

    def found(self, *path: str) -> Any:
        """The member at a path; None where there is none."""
        node: Any = self.metrics
        for name in path:
            node = node.get(name) if isinstance(node, Mapping) else None
        return node

    def control(self, start: str, *path: str) -> Any:
        """A member of the first control whose name starts so."""
        names = (name for name in self.found("controls") or () if name.startswith(start))
        name = next(names, None)
        return None if name is None else self.found("controls", name, *path)


Write = Callable[[Student], str]


@dataclass(frozen=True)
class Line:
    """A row of the table: its heading, and what it says of a student."""

    heading: str
    write: Write


def read_students(arguments: Sequence[str]) -> list[Student]:
    """Students in the order in which they are named first; UsageError for what is none."""
    students: dict[str, Student] = {}
    for argument in arguments:
        name, mark, file = argument.rpartition("=")
        entries = list(read_entries(Path(file).expanduser()))
        if not entries:
            raise UsageError(f"{file} holds no measurement", "give what eval --json printed")
        for entry in entries:
            called = name if mark else entry.model
            student = students.setdefault(called, Student(called))
            _merge(student.metrics, _without_samples(entry.metrics), f"{called}: {file}")
            student.runs.append(_about(entry, file))
    return list(students.values())


def _about(entry: Entry, file: str) -> dict[str, Any]:
    facts = {name: entry.about[name] for name in ABOUT if entry.about.get(name)}
    return {"file": Path(file).name} | facts


def _merge(known: dict[str, Any], new: Mapping[str, Any], where: str) -> None:
    """Put what is new beside what is known; UsageError where they contradict each other."""
    for name, value in new.items():
        if isinstance(value, Mapping) and isinstance(known.get(name), dict):
            _merge(known[name], value, f"{where}, {name}")
        elif known.setdefault(name, value) != value:
            raise UsageError(
                f"{where}: another file says something else of {name}",
                "give two runs that measured the same two names",
            )


def _without_samples(node: Any) -> Any:
    if isinstance(node, Mapping):
        return {name: _without_samples(each) for name, each in node.items() if name != SAMPLES}
    return node


def lines(students: Sequence[Student]) -> Iterator[Line]:
    """Every row that some student has something to say in."""
    yield from _cache_lines(students)
    for data in _names(students, "fidelity"):
        suffix = f", {data}" if len(_names(students, "fidelity")) > 1 else ""
        for metric in (KL, AGREEMENT, PERPLEXITY_RATIO):
            heading = "perplexity ratio" if metric is PERPLEXITY_RATIO else metric.heading
            yield Line(f"{heading}{suffix}", _number(metric, "fidelity", data))
        yield Line(f"KL of the window control{suffix}", _of_control(WINDOW, KL, "fidelity", data))
        yield Line(
            f"KL with the state set to zero{suffix}", _of_control(ABLATED, KL, "fidelity", data)
        )
    yield Line("mean recall over the teacher's", _number(MEAN_RECALL_RATIO, "recall", "recall"))
    yield Line("lowest of the six", _least)
    yield Line(
        "recall of the window control",
        _of_control(WINDOW, MEAN_RECALL_RATIO, "recall", "recall"),
    )
    for probe in _names(students, "recall"):
        if probe != "recall":
            yield Line(f"recall, {probe}", _number(RECALL_RATIO, "recall", probe))
    yield Line("needle over the teacher's", _needle)
    for length in _names(students, "needle", "student", "by_length"):
        yield Line(f"needles found at {int(length):,}; by the teacher", _needle_at(length))
    yield Line("difference of tasks to the teacher, points", _task_points)


def _cache_lines(students: Sequence[Student]) -> Iterator[Line]:
    def kept(student: Student) -> str:
        # attention alone has nothing but keys and values
        found = next(iter((student.found("cache", "sequences") or {}).values()), {})
        whole = found.get("teacher_total")
        return percent(found["kv"] / whole) if whole else ""

    yield Line("KV heads kept", kept)
    for tokens in _names(students, "cache", "sequences"):
        path = ("cache", "sequences", tokens)
        yield Line(f"cache over the teacher's, {int(tokens):,} tokens", _number(SHARE, *path))


def _names(students: Sequence[Student], *path: str) -> list[str]:
    """Names of members that some student has there, in order."""
    every = (student.found(*path) or {} for student in students)
    return list(dict.fromkeys(name for found in every for name in found))


def _written(metric: Metric, found: Any, key: str = "") -> str:
    """A number with its interval, if tables of `eval` show that; empty where there is none."""
    name = key or metric.name
    if not isinstance(found, Mapping) or found.get(name) is None:
        return ""
    interval = (found.get("intervals") or {}).get(name) if metric.interval else None
    text = metric.write(found[name])
    return f"{text} [{span(interval, metric.write)}]" if interval else text


def _number(metric: Metric, *path: str) -> Write:
    return lambda student: _written(metric, student.found(*path))


def _of_control(start: str, metric: Metric, *path: str) -> Write:
    return lambda student: _written(metric, student.control(start, *path))


def _least(student: Student) -> str:
    found = student.found("recall", "recall")
    text = _written(LEAST_RECALL_RATIO, found)
    return f"{text} ({found['least_probe']})" if text else ""


def _needle(student: Student) -> str:
    return _written(NEEDLE_RATIO, student.found("needle", "student"), MEAN_NEEDLE_RATIO)


def _needle_at(length: str) -> Write:
    def write(student: Student) -> str:
        found = student.found("needle", "student", "by_length", length)
        if not found:
            return ""
        theirs = found[f"teacher_{RETRIEVED.name}"]
        text = f"{hundredths(found[RETRIEVED.name])}; {hundredths(theirs)}"
        return text if found["counted"] else f"({text})"

    return write


def _task_points(student: Student) -> str:
    mean = student.found("task_differences", "mean")
    if not mean:
        return ""

    def points(share: float) -> str:
        return f"{100 * share:+.2f}"

    interval = f" [{span(mean['interval'], points)}]" if mean["interval"] else ""
    return f"{points(mean['difference'])}{interval} ({count(mean['tasks'])} tasks)"


def markdown(students: Sequence[Student]) -> str:
    """Return the table of all students."""
    rows = [["", *(student.name for student in students)], ["---", *["--:"] * len(students)]]
    for line in lines(students):
        texts = [line.write(student) for student in students]
        if any(texts):
            rows.append([line.heading, *texts])
    return "\n".join(markdown_row(row) for row in rows)


def draw(students: Sequence[Student], out: Path) -> None:
    """Draw KL and recall over the cache as PNG; a curve through the best of about each size.

    Raises UsageError without a cache or a measurement, ResourceError without matplotlib.
    """
    lengths = [int(tokens) for tokens in _names(students, "cache", "sequences")]
    if not lengths:
        raise UsageError("no student has a cache", "measure with eval --data")
    # long enough that keys and values outweigh states and windows
    tokens = min(lengths, key=lambda length: abs(length - DRAWN_LENGTH))
    figure = new_figure(INCHES)
    panels = (
        ("KL to the teacher, nats per token", ("fidelity", _names(students, "fidelity")[0]), KL),
        ("recall over the teacher's", ("recall", "recall"), MEAN_RECALL_RATIO),
    )
    for axes, (title, path, metric) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        _panel(axes, students, str(tokens), path, metric)
        axes.set_xlabel(f"cache of a sequence of {count(tokens)} tokens, MiB")
        axes.set_title(title, fontsize=10)
    figure.tight_layout()
    figure.savefig(out, dpi=PIXELS, format="png", metadata={"Software": None})


def _panel(
    axes: Any, students: Sequence[Student], tokens: str, path: Sequence[str], metric: Metric
) -> None:
    """One number over the cache, of students and of their controls, and the teacher's size."""
    every = [(each, each.found("cache", "sequences", tokens)) for each in students]
    sized = [(each, size) for each, size in every if size]
    found = [(size["total"], each.found(*path, metric.name), each.name) for each, size in sized]
    named = _curve(axes, found, metric, "o-", "C0", "student")
    for size, value, name in named:
        short = name.partition(",")[0]
        axes.annotate(short, (size, value), (0, -13), textcoords="offset points", fontsize=8,
                      ha="center")  # fmt: skip
    found = [(z["total"], each.control(WINDOW, *path, metric.name), "") for each, z in sized]
    _curve(axes, found, metric, "s--", "C7", "untrained control")
    teacher = sized[0][1]["teacher_total"] / MIB
    axes.axvline(teacher, color="0.6", lw=1, ls=":")
    axes.annotate("teacher's cache", (teacher, 0.5), (-11, 0), xycoords=("data", "axes fraction"),
                  textcoords="offset points", fontsize=8, rotation=90, va="center")  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    bottom, top = axes.get_ylim()
    axes.set_ylim(min(0.0, bottom) - 0.08 * top, 1.05 * top)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def _curve(
    axes: Any,
    found: Sequence[tuple[int, float | None, str]],
    metric: Metric,
    style: str,
    colour: str,
    label: str,
) -> list[tuple[float, float, str]]:
    """Draw bytes and numbers, a line through the best of about each size, returned in MiB."""
    sign = 1 if metric.better == "lower" else -1
    points = [(size / MIB, value, name) for size, value, name in found if value is not None]
    best: list[tuple[float, float, str]] = []
    first = 0.0
    for point in sorted(points):
        if not best or point[0] > NEAR * first:
            first = point[0]
            best.append(point)
        else:
            best[-1] = min(best[-1], point, key=lambda each: sign * each[1])
    for marks, shown in ((style, best), (style[:1], points)):
        xs, ys = [point[0] for point in shown], [point[1] for point in shown]
        axes.plot(xs, ys, marks, color=colour, ms=4.5, label=label if marks == style else None)
    return best


def write_numbers(students: Sequence[Student], about: str, out: Path) -> None:
    """Write everything that was measured, a member of `students` each."""
    content = {
        "about": about,
        "students": [
            {"name": each.name, "runs": each.runs, "metrics": each.metrics} for each in students
        ],
    }
    with explained(out, *NAMED_FILE), replacing(out) as new:
        new.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", "utf-8")


def measure(given: Namespace) -> StageResult:
    """The table; nothing is measured again."""
    students = read_students(given.files)
    if given.out is not None:
        write_numbers(students, given.about, Path(given.out).expanduser())
    if given.figure is not None:
        path = Path(given.figure).expanduser()
        with explained(path, *NAMED_FILE), replacing(path) as new:
            draw(students, new)
    return StageResult(None, {}, markdown(students))


if __name__ == "__main__":
    sys.exit(command.run(measure, PARSER.parse_args()))
