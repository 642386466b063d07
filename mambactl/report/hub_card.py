"""The front matter that the hub reads from a card, and kept results in it."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mambactl.checkpoint.card import with_results
from mambactl.checkpoint.hub_files import PublicFiles
from mambactl.checkpoint.hub_names import hub_name
from mambactl.checkpoint.local_names import is_local, local_paths, without_local_names
from mambactl.files import RESULTS, side_file
from mambactl.json_values import AnyObject
from mambactl.present import of_kind
from mambactl.report.card_results import OWN_NAME, markdown
from mambactl.report.entries import Entry, read_entries
from mambactl.report.summary import MODEL, Column, summarise

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

TASK = "text-generation"


def hub_card(files: PublicFiles, name: str, checkpoint: Path, inherited: AnyObject) -> str:
    """The card of a checkpoint, with its kept results, as the hub shows and indexes it.

    `name` is that of the model on the hub; `inherited` is what the front matter of the base model
    says, of which a key counts that the card does not have.
    """
    from huggingface_hub import ModelCard, ModelCardData

    folder = side_file(checkpoint, RESULTS)
    entries = [each for file in sorted(folder.glob("eval-*.json")) for each in read_entries(file)]
    card = files.card
    if entries:
        card = with_results(card, markdown(entries, folder.parent))
    paths = [*files.known, str(checkpoint), *(path for entry in entries for path in _named(entry))]
    public = without_local_names(card, tuple(dict.fromkeys(paths)))
    assert isinstance(public, str)
    shown = ModelCard(public, ignore_metadata_errors=True)
    front = of_kind(ModelCardData, shown.data)
    front.base_model = files.base or _of_the_hub(front.base_model)
    for key, value in {"datasets": data_sets(files.lineage) or None, **inherited}.items():
        if front.get(key) is None and value is not None:
            front[key] = value
    if found := list(_evaluations(entries)):
        front.model_name = front.model_name or name
        front.eval_results = found
    return str(shown)


def _of_the_hub(base: Any) -> Any:
    """A base model that a card names already, unless it is no name on the hub."""
    return hub_name(base) if isinstance(base, str) else base


def data_sets(lineage: AnyObject) -> list[str]:
    """Ids of data sets of the hub that any stage was trained or fitted on."""
    found: dict[str, None] = {}
    for stage in (*lineage.get("ancestors", []), lineage):
        options = stage.get("recipe") or {}
        for key in ("data", "calibrate"):
            given = options.get(key) or []
            for spec in given if isinstance(given, list) else [given]:
                if isinstance(spec, str) and spec.count("/") == 1 and not is_local(spec):
                    found[_repository(spec)] = None
    return list(found)


def _repository(spec: str) -> str:
    """The id in `ID:config@split=weight`."""
    for mark in ":@=":
        spec = spec.partition(mark)[0]
    return spec


def _named(entry: Entry) -> Iterator[str]:
    """Paths that a measurement names: in its command, and as what it was measured on."""
    import shlex

    try:
        words = shlex.split(entry.source.command)
    except ValueError:
        words = []
    yield from local_paths([*words, entry.source.file, entry.model])
    yield from local_paths(entry.about)


def _evaluations(entries: Sequence[Entry]) -> Iterator["EvalResult"]:
    """A row of the model-index for every number; of several runs the last counts."""
    from huggingface_hub import EvalResult

    cells: dict[Column, float] = {}
    for row in summarise(replace(entry, model=OWN_NAME) for entry in entries).rows:
        if row.kind == MODEL:
            cells |= {column: cell.value for column, cell in row.cells.items()}
    for column, value in cells.items():
        if column.group == "cache":
            continue
        name = _measured_on(column)
        yield EvalResult(
            task_type=TASK,
            dataset_type=name.partition(",")[0],
            dataset_name=name,
            metric_type=column.metric.name,
            metric_name=column.metric.heading or column.metric.name,
            metric_value=value,
        )


def _measured_on(column: Column) -> str:
    """The data set of a column, which its heading names for a task and its group for text."""
    measured = column.metric.name if column.metric.summary is None else column.metric.summary
    heading = column.heading.removesuffix(measured).strip()
    name = heading if column.group == "tasks" else f"{column.group} {heading}".strip()
    public = without_local_names(name or "held-out")
    assert isinstance(public, str)
    return public
