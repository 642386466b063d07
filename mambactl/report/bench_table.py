"""The performance table of a README, made from the JSON that `bench` prints."""

from collections.abc import Iterator, Sequence

from mambactl import metrics
from mambactl.errors import UsageError
from mambactl.json_values import JsonObject
from mambactl.metrics import Metric
from mambactl.report.kept_results import require_measured

Result = JsonObject


def markdown(files: Sequence[tuple[str, JsonObject]]) -> str:
    """A row per point of every file (name, content), then what they were measured on.

    A file holds one `bench` result, or a recipe's with any number of them. Raises UsageError for a
    file without any point.
    """
    numbers = _numbers(files)
    headings = ("model", "draft", *(each.heading for each in numbers))
    lines = [metrics.markdown_row(headings), "|---|---|" + "--:|" * len(numbers)]
    about: dict[str, None] = {}
    for name, content in files:
        rows = 0
        for result in _results(name, content):
            about[_machine(result)] = None
            for row in _rows(result, numbers):
                lines.append(metrics.markdown_row(row))
                rows += 1
        if not rows:
            raise UsageError(f"{name} has no measured point", "give what `bench --json` printed")
    return "\n".join([*lines, "", *about])


def _results(name: str, content: JsonObject) -> Iterator[Result]:
    if isinstance(content.get("result"), dict):
        # the record of a section, which recipe run left in its folder
        content = content["result"]
    sections = content.get("sections")
    for each in sections.values() if isinstance(sections, dict) else [content]:
        result = each.get("metrics") if isinstance(each, dict) else None
        if isinstance(result, dict) and result.get("points"):
            require_measured(result, each, name)
            model = metrics.last_part(str(each.get("checkpoint") or ""))
            # files kept before points named their model
            points = [{"model": model, **point} for point in result["points"]]
            yield {**result, "points": points}


def _numbers(files: Sequence[tuple[str, JsonObject]]) -> list[Metric]:
    """The columns: all of a point, but for the first token's where no result has it."""
    points = [
        point
        for name, content in files
        for result in _results(name, content)
        for point in result["points"]
        if isinstance(point, dict)
    ]
    timed = any(metrics.FIRST_TOKEN.name in point for point in points)
    return [each for each in metrics.group("point") if timed or each is not metrics.FIRST_TOKEN]


def _rows(result: Result, numbers: Sequence[Metric]) -> Iterator[list[str]]:
    draft = (result.get("config") or {}).get("draft")
    for point in [*result["points"], *(result.get("baseline_points") or [])]:
        own = draft if metrics.DRAFTED_GAIN.name in point else None
        names = (metrics.last_part(name) for name in (point.get("model") or "", own or ""))
        yield [*names, *(each.written(point) for each in numbers)]


def _machine(result: Result) -> str:
    """One sentence: device, type of the weights, versions, date."""
    versions = (result.get("versions") or {}).items()
    parts = [result.get("device"), result.get("dtype")]
    parts += [f"{package} {version}" for package, version in versions if version]
    parts.append(result.get("date"))
    return f"Measured on {', '.join(str(part) for part in parts if part)}."
