"""One or several models measured in the same way, on one page; results are kept as ever."""

import gc
import shlex
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch

from mambactl import console, invocation
from mambactl.checkpoint.resolve import resolve
from mambactl.errors import CheckError, OutputError, UsageError
from mambactl.figures import new_figure
from mambactl.files import RESULTS, explained
from mambactl.json_values import JsonObject
from mambactl.options import BenchConfig, StageConfig
from mambactl.present import of_kind, present
from mambactl.ranks import is_main
from mambactl.report.collect import collect, kept_beside
from mambactl.report.page import write_report
from mambactl.report.results import file_name, write_results
from mambactl.report.summary import CONTROL, summarise
from mambactl.stage_result import StageResult

DEFAULT_REPORT = "runs/compare.html"


class MeasuringCommand(Protocol):
    """The module of a command that measures models: `commands.eval` or `commands.bench`."""

    STAGE: str

    def plan(self, config: StageConfig, source: str | None) -> JsonObject:
        """Resolve and check everything, measure nothing."""
        ...

    def measure(self, config: StageConfig, source: str | None) -> StageResult:
        """Measure one model and keep the numbers, whatever they are."""
        ...

    def check(self, config: StageConfig, metrics: JsonObject) -> None:
        """Raise CheckError where a bound does not hold."""


def run(
    config: StageConfig, sources: Sequence[str | None], command: MeasuringCommand
) -> StageResult:
    """Measure each of `sources` with `command`, then write the page of `report`.

    Every model is measured, and the page is there, before a bound that does not hold is a
    CheckError. What cannot be kept beside a model (one given by name) is kept beside the page.
    """
    report = Path(getattr(config, "report", None) or DEFAULT_REPORT).expanduser().absolute()
    _require_writable(report)
    if len(sources) > 1:
        _require_different(sources)
        for source in sources:
            # one that cannot be measured is said before hours are spent on the others
            with console.silenced():
                command.plan(config, source)
    results = []
    for number, source in enumerate(sources):
        if len(sources) > 1:
            console.log(f"[{number + 1}/{len(sources)}] {source}")
        results.append(_measure(command, config, source, report))
        _free_memory()
    if not is_main():
        return results[0]
    files = [result.kept for result in results]
    if len(sources) > 1:
        show(files)
    ledgers = [file for source in sources for file in _ledgers(source)]
    write_report([*files, *ledgers], report, shlex.join(invocation.words()))
    console.log(f"report: {report}")
    _check(command, config, sources, results)
    if len(sources) == 1:
        only = results[0]
        return StageResult(only.path, only.metrics | {"report": str(report)}, only.text, only.kept)
    models = [
        {"checkpoint": each.path, "metrics": each.metrics, "results": str(each.kept)}
        for each in results
    ]
    return StageResult(None, {"report": str(report), "models": models}, str(report))


def plan(
    config: StageConfig, sources: Sequence[str | None], command: MeasuringCommand
) -> JsonObject:
    """Describe the measurements of each; writes nothing."""
    if len(sources) > 1:
        _require_different(sources)
    report = str(Path(getattr(config, "report", None) or DEFAULT_REPORT).expanduser().absolute())
    return {"report": report, "models": [command.plan(config, source) for source in sources]}


def show(files: Sequence[Path]) -> None:
    """One table of all models, as rows."""
    found = summarise(collect(files).entries)
    sets = {column.group for column in found.columns if column.heading == "KL"}
    columns = [
        f"{column.group}: {column.heading}"
        if column.group in sets and len(sets) > 1
        else column.heading
        for column in found.columns
    ]
    rows = [
        (
            f"  {row.name}" if row.kind == CONTROL else row.name,
            # one word each, which is not broken where lines are short
            *(
                column.write(row.cells[column].value).replace(" ", "")
                if column in row.cells
                else ""
                for column in found.columns
            ),
        )
        for row in found.rows
    ]
    title = f"{len(files)} models" + (f" on {', '.join(sets)}" if len(sets) == 1 else "")
    console.table(title, ("model", *columns), rows)


def _measure(
    command: MeasuringCommand, config: StageConfig, source: str | None, report: Path
) -> StageResult:
    result = command.measure(config, source)
    if result.kept is not None or not is_main():
        return result
    folder = report.with_name(f"{report.stem}.{RESULTS}")
    stage = command.STAGE
    path = folder / file_name(stage, source or _without_model(of_kind(BenchConfig, config)))
    with explained(path, "free some space", "give --report a place that can be written"):
        folder.mkdir(exist_ok=True)
        write_results(path, stage, source, config, result.metrics)
    return StageResult(result.path, result.metrics, result.text, path)


def _without_model(config: BenchConfig) -> str:
    """Measurements of a bench without a checkpoint."""
    return "-".join([*(["training"] if config.training else []), *config.synthetic])


def _check(
    command: MeasuringCommand,
    config: StageConfig,
    sources: Sequence[str | None],
    results: Sequence[StageResult],
) -> None:
    failed = []
    for source, result in zip(sources, results, strict=True):
        try:
            command.check(config, result.metrics)
        except CheckError as error:
            failed.append(f"{source}: {error}" if len(sources) > 1 else str(error))
    if failed:
        raise CheckError("; ".join(failed))


def _require_writable(report: Path) -> None:
    """Say before measuring what would keep the page from being written."""
    new_figure((1, 1))
    if report.is_dir():
        raise OutputError(f"{report} is a folder", "give --report a file, page.html say")
    with explained(report, "free some space", "give --report a place that can be written"):
        report.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=report.parent).close()


def _require_different(sources: Sequence[str | None]) -> None:
    paths = [resolve(present(source)).path for source in sources]
    for path, source in zip(paths, sources, strict=True):
        if paths.count(path) > 1:
            raise UsageError(f"{source} is given twice", "a comparison is of different models")


def _ledgers(source: str | None) -> list[Path]:
    if source is None:
        return []
    return [file for file in kept_beside(Path(source).expanduser()) if file.suffix == ".jsonl"]


def _free_memory() -> None:
    # the next model's peak must not hold this one
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
