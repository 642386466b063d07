"""Runs of lm-evaluation-harness in process: its tasks, its prompts, its scores and its table."""

import difflib
import hashlib
import io
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from functools import partialmethod
from numbers import Real
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.api.model import CachingLM
from lm_eval.api.task import ConfigurableTask
from lm_eval.caching import cache as request_cache
from lm_eval.evaluator import evaluate as _evaluate
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable, make_table
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from mambactl import console
from mambactl.errors import MambactlError, ResourceError, UsageError
from mambactl.evaluation.harness.harness_model import HarnessModel
from mambactl.evaluation.harness.schemas import plain_name
from mambactl.evaluation.harness.task_files import sandboxed_templates
from mambactl.evaluation.harness.task_metrics import TaskScores
from mambactl.evaluation.harness.tasks import SUBJECT, HarnessOptions, LocalTask, Wanted
from mambactl.foreign import reason
from mambactl.generation.dealer import ALONE, Dealer
from mambactl.json_values import JsonObject

# its parameters are lost behind a decorator, and what it returns has other keys than it says
evaluate: Callable[..., Any] = _evaluate

# resamples behind the standard error of metrics that have no closed form
BOOTSTRAP_ITERS = 1000


class LocalConfigurableTask(ConfigurableTask):
    """A task of the harness whose worked examples are of the subject that is asked about."""

    def __init__(self, task: LocalTask):
        super().__init__(config=task.config())
        self.by_subject: dict[object, list[JsonObject]] = {}
        for row in task.pool.rows if task.pool is not None else ():
            self.by_subject.setdefault(row.get(SUBJECT), []).append(row)

    def fewshot_context(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, doc: JsonObject, num_fewshot: int, **options: Any
    ) -> object:
        """The prompt of one row, as the harness makes it."""
        if len(self.by_subject) > 1 and num_fewshot:
            self.sampler.replace_df(self.by_subject[doc[SUBJECT]])
        return super().fewshot_context(doc, num_fewshot, **options)


def score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    wanted: Sequence[Wanted],
    options: HarnessOptions,
    dealer: Dealer = ALONE,
) -> TaskScores:
    """Run tasks; UsageError for one that nobody knows, ResourceError for one that is not there."""
    set_seed(options.seed)
    with _quiet(), sandboxed_templates():
        loaded = _load(wanted, options)
        ours = HarnessModel(model, tokenizer, options.batch_size, options.max_length, dealer)
        kept = None if options.answers is None else CachingLM(ours, str(options.answers))
        as_turns = options.fewshot_as_multiturn
        # simple_evaluate is this plus seconds of collecting the versions of everything installed
        with _requests_kept(wanted, tokenizer, options), _tasks_blamed(wanted, ours, options):
            results: JsonObject = evaluate(
                lm=kept or ours,
                task_dict=loaded,
                limit=options.limit,
                cache_requests=options.requests is not None,
                bootstrap_iters=BOOTSTRAP_ITERS,
                log_samples=options.log_samples or options.by_document,
                system_instruction=options.system_instruction,
                apply_chat_template=options.apply_chat_template,
                # as the harness's command line: with a chat template unless told otherwise
                fewshot_as_multiturn=options.apply_chat_template if as_turns is None else as_turns,
            )
        ours.finish()
    metrics = {name: _scores(entry) for name, entry in results["results"].items()}
    table = make_table(results)
    if results.get("groups"):
        table += "\n" + make_table(results, "groups")
    found = results.get("samples") or {}
    documents = {name: _by_document(rows) for name, rows in found.items()}
    kept_samples = found if options.log_samples else {}
    samples = json.loads(json.dumps(kept_samples, default=handle_non_serializable))
    parts = results.get("group_subtasks") or {}
    groups = {name: list(found) for name, found in parts.items() if found and name in metrics}
    return TaskScores(metrics, table, samples, groups, documents)


def _by_document(rows: Sequence[JsonObject]) -> dict[str, dict[int, float]]:
    """Numbers of every document by metric; some metrics have none before they are aggregated."""
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        for metric in row["metrics"]:
            if isinstance(row[metric], Real):
                name = plain_name(f"{metric},{row['filter']}")
                found.setdefault(name, {})[row["doc_id"]] = float(row[metric])
    return found


def _scores(entry: JsonObject) -> dict[str, float]:
    return {
        plain_name(key): float(value)
        for key, value in entry.items()
        if "," in key and isinstance(value, int | float)
    }


@contextmanager
def _tasks_blamed(
    wanted: Sequence[Wanted], model: HarnessModel, options: HarnessOptions
) -> Iterator[None]:
    """Make what fails in a folder's tasks, and not in the model that answers, a UsageError."""
    try:
        yield
    except MambactlError:
        raise
    except Exception as error:  # templates and scores fail in many ways
        if model.failed or options.task_dir is None or all(task.local for task in wanted):
            raise
        names = ", ".join(task.name for task in wanted if task.local is None)
        raise UsageError(
            f"{names}: a template or a score fails ({reason(error)})",
            f"mend the YAML files in {options.task_dir}, or use the tasks of the harness",
        ) from error


def _load(wanted: Sequence[Wanted], options: HarnessOptions) -> JsonObject:
    names = [task.name for task in wanted if task.local is None]
    manager = _manager(names, options.task_dir)
    whole: JsonObject = {"tasks": {}, "groups": {}, "group_map": {}}
    for task in wanted:
        if task.local is not None:
            part = manager.load([LocalConfigurableTask(task.local)])
        elif (part := _load_named(manager, task, options)) is None:
            continue
        for leaf in part["tasks"].values():
            _set_shots(leaf, task, options)
        for kind, found in part.items():
            whole[kind] |= found
    if not whole["tasks"]:
        raise ResourceError(
            "none of the tasks can be loaded", "--task-dir FOLDER names one with local sets"
        )
    return whole


def _load_named(manager: TaskManager, task: Wanted, options: HarnessOptions) -> JsonObject | None:
    """The tasks behind a name, None where the others go on without it."""
    try:
        part: JsonObject = {**manager.load([task.name])}
    except Exception as error:  # the harness and its data sets fail in many ways
        if task.optional:
            console.warn(f"{task.name} is left out: it cannot be loaded ({reason(error)})")
            return None
        failed = f"the task {task.name} cannot be loaded: {reason(error)}"
        entry = manager.task_index.get(task.name)
        if options.task_dir is not None and entry is not None and _lies_in(entry, options.task_dir):
            raise UsageError(f"{entry.yaml_path}: {failed}", "mend the file") from error
        raise ResourceError(
            failed, "its data is fetched from the network; local .jsonl files work without one"
        ) from error
    for name, leaf in part["tasks"].items():
        if getattr(leaf, "UNSAFE_CODE", False):
            raise UsageError(
                f"the task {name} runs the code that the model writes, which is not done here",
                "export the model, and use lm-eval with --confirm_run_unsafe_code",
            )
    return part


def _lies_in(entry: Any, folder: str) -> bool:
    path = entry.yaml_path
    return path is not None and path.is_relative_to(Path(folder))


def _set_shots(leaf: Any, task: Wanted, options: HarnessOptions) -> None:
    default = leaf.get_config("num_fewshot")
    shots = options.num_fewshot if task.shots is None else task.shots
    if default == 0 and shots and task.shots is None:
        console.log(f"{task.name} is defined with 0 shots, which --num-fewshot does not change")
        shots = 0
    leaf.set_config("num_fewshot", (default or 0) if shots is None else shots)
    leaf.set_fewshot_seed(options.fewshot_seed)


def _manager(names: Sequence[str], folder: str | None) -> TaskManager:
    """Task manager of the harness: of a folder's tasks alone where they are enough."""
    if not names:
        folder = None
    manager = TaskManager(include_path=folder, include_defaults=False)
    if all(manager.match_tasks([name]) for name in names):
        return manager
    console.log("reading the task list of lm-evaluation-harness, which takes some seconds")
    manager = TaskManager(include_path=folder, include_defaults=True)
    for name in names:
        if not manager.match_tasks([name]):
            near = difflib.get_close_matches(name, manager.all_tasks, n=3)
            raise UsageError(
                f"lm-evaluation-harness knows no task {name!r}",
                hint=(f"did you mean {', '.join(near)}? " if near else "")
                + "`lm-eval ls tasks` lists all; files end in .jsonl or .jsonl.gz",
            )
    return manager


@contextmanager
def _requests_kept(
    wanted: Sequence[Wanted], tokenizer: PreTrainedTokenizerBase, options: HarnessOptions
) -> Iterator[None]:
    """Let the harness cache prompts in a folder per set of inputs, as it compares names alone."""
    if options.requests is None:
        yield
        return
    made_from = [
        [(task.name, task.local and (task.local.rows, task.local.pool)) for task in wanted],
        (options.fewshot_seed, options.task_dir, lm_eval.__version__),
        tokenizer.chat_template if options.apply_chat_template else None,
    ]
    digest = hashlib.sha256(repr(made_from).encode()).hexdigest()[:16]
    before, request_cache.PATH = request_cache.PATH, str(options.requests / digest)
    try:
        yield
    finally:
        request_cache.PATH = before


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the harness's warnings, prints, bars and worker processes out of the way."""
    logger, start_bar, variable = logging.getLogger("lm_eval"), tqdm.__init__, "DISABLE_MULTIPROC"
    level, before = logger.level, os.environ.get(variable)
    logger.setLevel(logging.ERROR)
    tqdm.__init__ = partialmethod(start_bar, disable=True)  # pyright: ignore[reportAttributeAccessIssue]
    os.environ[variable] = "1"
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
        tqdm.__init__ = start_bar
        if before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before
