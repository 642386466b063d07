"""Tasks of one `eval`: their names and sources, their prompts, and their scoring."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from mambactl import console
from mambactl.checkpoint.load import load_tokenizer
from mambactl.checkpoint.resolve import resolve
from mambactl.data.sources import set_name
from mambactl.errors import UsageError
from mambactl.evaluation.harness.presets import MAX_LENGTH, PRESETS, summary
from mambactl.evaluation.harness.task_files import require_data
from mambactl.evaluation.harness.task_metrics import TaskScores
from mambactl.evaluation.harness.task_options import TaskOptions
from mambactl.evaluation.harness.tasks import (
    HarnessOptions,
    Wanted,
    find_local,
    is_local,
    load_local_task,
    matching,
    require_distinct,
    require_harness,
)
from mambactl.files import CARD, cache_dir
from mambactl.generation.dealer import ALONE, Dealer
from mambactl.json_values import JsonObject
from mambactl.options.evaluation import EvalBase
from mambactl.present import present
from mambactl.ranks import placement

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class TaskPlan:
    """Tasks that were found and read; `presets` are the lists that they fill, `names` what they
    were asked for as.
    """

    wanted: list[Wanted]
    presets: list[str]
    names: list[str]
    samples: Path | None = None

    def rows(self) -> dict[str, int | None]:
        """Task -> rows, None where only the harness knows."""
        return {task.name: task.local and len(task.local.rows) for task in self.wanted}

    def metrics(self) -> dict[str, list[str]] | None:
        """Task -> scores, None where only the harness knows."""
        if any(task.local is None for task in self.wanted):
            return None
        local = {task.name: present(task.local) for task in self.wanted}
        known = {name: task.schema.metrics for name, task in local.items()}
        return known | {name: list(summary(PRESETS[name], {})) for name in self.presets}


def read(config: TaskOptions, source: str) -> TaskPlan:
    """Resolve and check everything about tasks before a model is loaded."""
    require_harness()
    _check(config, source)
    presets = [name for name in dict.fromkeys(config.tasks) if name in PRESETS]
    wanted = list(dict.fromkeys(_expand(config)))
    require_distinct([name for name, _, _ in wanted])
    found = [_find(config, *one) for one in wanted]
    require_distinct([task.name for task in found])
    # what is no file of rows is looked for in YAML files
    named = not all(task.local for task in found)
    if named and config.task_dir is not None and not config.trust_remote_code:
        require_data(Path(config.task_dir).expanduser())
    names = [set_name(task) for task in config.tasks]
    return TaskPlan(found, presets, names, _samples(config, source))


def score_wanted(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    wanted: Sequence[Wanted],
    options: HarnessOptions,
    dealer: Dealer = ALONE,
) -> TaskScores:
    """Score a model on tasks; ResourceError when the harness is missing."""
    require_harness()
    from mambactl.evaluation.harness.scoring import score

    return score(model, tokenizer, wanted, options, dealer)


def show_presets(plan: TaskPlan, source: str, scores: dict[str, dict[str, float]]) -> None:
    """Print a table of every list of the paper that was asked for."""
    for name in plan.presets:
        columns = {column.label: column for column in PRESETS[name]}
        numbers = summary(PRESETS[name], scores)
        measured = sum(numbers[label] is not None for label in columns)
        lines = [
            (label, str(column.shots), column.metric, _percent(numbers[label]))
            for label, column in columns.items()
        ]
        average = f"average of {measured} of {len(columns)}"
        lines.append((average, "", "", _percent(numbers["average"])))
        console.table(f"{name} of {source}", ("", "shots", "metric", "%"), lines)


def _expand(config: TaskOptions) -> list[tuple[str, int | None, bool]]:
    """(task, its own number of worked examples, whether others go on without it)."""
    every: list[tuple[str, int | None, bool]] = []
    for spec in config.tasks:
        if spec in PRESETS:
            every += [
                (task, column.shots, True) for column in PRESETS[spec] for task in column.tasks
            ]
        else:
            names = matching(spec, config.task_dir) or [spec]
            every += [(name, None, False) for name in names]
    return every


def _find(config: TaskOptions, name: str, shots: int | None, optional: bool) -> Wanted:
    examples = (config.num_fewshot or 0) if shots is None else shots
    if is_local(name):
        task = load_local_task(name, config.limit, examples)
        return Wanted(task.name, task, shots)
    found = find_local(name, config.task_dir)
    if found is None:
        return Wanted(name, None, shots, optional)
    path, schema = found
    console.log(f"{name}: {path}", level=2)
    task = load_local_task(str(path), config.limit, examples, name, schema)
    if task.pool is not None and task.pool.own:
        console.warn(f"{name} has no pool of worked examples; they are other rows of the set")
    return Wanted(name, task, shots)


def _check(config: TaskOptions, source: str) -> None:
    if config.task_dir is not None and not Path(config.task_dir).expanduser().is_dir():
        raise UsageError(f"--task-dir {config.task_dir} is no folder", "give one with task files")
    if config.num_fewshot is not None and any(name in PRESETS for name in config.tasks):
        raise UsageError(
            "a list of the paper says itself how many worked examples its tasks have",
            hint="leave out --num-fewshot, or name the tasks",
        )
    if config.fewshot_as_multiturn and not config.apply_chat_template:
        raise UsageError("chat turns need a chat template", "add --apply-chat-template")
    if config.apply_chat_template:
        tokenizer = load_tokenizer(source, config.trust_remote_code)
        if not getattr(tokenizer, "chat_template", None):
            raise UsageError(f"{source} has no chat template", "leave out --apply-chat-template")


def _samples(config: TaskOptions, source: str) -> Path | None:
    if not config.log_samples:
        return None
    if config.output_path is not None:
        return Path(config.output_path).expanduser()
    folder = Path(source).expanduser()
    if not folder.is_dir():
        raise UsageError(
            f"samples need a place: {source} is no folder of yours", "add --output-path FOLDER"
        )
    return folder / "results"


def harness_options(
    plan: TaskPlan,
    config: TaskOptions,
    source: str,
    model: "PreTrainedModel",
    compared: bool = False,
) -> HarnessOptions:
    """Options of the harness; `compared` with another model, document by document."""
    longest = config.task_max_length
    if longest is None and plan.presets:
        longest = min(MAX_LENGTH, model.config.max_position_embeddings)
    kept = cache_dir() / "tasks"
    answers = None
    if config.use_cache is not None:
        kept = Path(config.use_cache).expanduser()
        answers = kept / f"{_fingerprint(config, source, longest)}.db"
    return HarnessOptions(
        num_fewshot=config.num_fewshot,
        apply_chat_template=config.apply_chat_template,
        fewshot_as_multiturn=config.fewshot_as_multiturn,
        system_instruction=config.system_instruction,
        limit=config.limit,
        batch_size=config.batch_size,
        max_length=longest,
        seed=config.seed,
        fewshot_seed=config.fewshot_seed,
        requests=kept / "requests" if config.cache_requests else None,
        answers=answers,
        log_samples=config.log_samples,
        by_document=compared,
        task_dir=config.task_dir,
    )


def _fingerprint(config: TaskOptions, source: str, max_length: int | None) -> str:
    """Name of one model's cached answers, which the harness looks up by the question alone."""
    path = Path(resolve(source).path)
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    facts = [
        (file.name, file.stat().st_size, file.stat().st_mtime_ns)
        for file in files
        # results in the card say nothing about the answers
        if file.is_file() and file.name != CARD
    ]
    device, dtype = placement(cast(EvalBase, config))
    whole = repr((str(path.resolve()), facts, device.type, str(dtype), max_length))
    return f"{path.stem}-{hashlib.sha256(whole.encode()).hexdigest()[:16]}"


def write_samples(folder: Path, samples: Mapping[str, Sequence[JsonObject]]) -> None:
    """Write a file of requests and answers per task."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in samples.items():
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"samples_{name}.jsonl").write_text("".join(lines), "utf-8")
    console.log(f"samples of {len(samples)} tasks are in {folder}")


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.2f}"
