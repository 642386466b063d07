"""lm-evaluation-harness in process; the one module that imports it."""

import difflib
import io
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import partialmethod
from typing import Any

import lm_eval
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import make_table
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from mambactl import console
from mambactl.errors import ResourceError, UsageError

# resamples behind the standard error of metrics that have no closed form
BOOTSTRAP_ITERS = 1000


@dataclass(frozen=True)
class TaskScores:
    """Scores by task and metric, and the harness's own table of them (markdown)."""

    metrics: dict[str, dict[str, float]]
    table: str


class HarnessModel(HFLM):
    """The harness's wrapper of a transformers model, with this program's progress."""

    _bar: console.Task | None = None

    def loglikelihood(self, requests: list, disable_tqdm: bool = False) -> list:
        """Log-likelihood of each continuation, and whether it is the greedy one."""
        with self._counting("likelihoods", len(requests)):
            return super().loglikelihood(requests, disable_tqdm=True)

    def generate_until(self, requests: list, disable_tqdm: bool = False) -> list:
        """Text generated after each context, up to a stop text."""
        with self._counting("generations", len(requests)):
            return super().generate_until(requests, disable_tqdm=True)

    @contextmanager
    def _counting(self, label: str, total: int) -> Iterator[None]:
        with console.progress(label, total) as self._bar:
            yield
        self._bar = None

    def _model_call(self, inps: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self._advance(len(inps))
        return super()._model_call(inps, *args, **kwargs)

    def _model_generate(self, context: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self._advance(len(context))
        return super()._model_generate(context, *args, **kwargs)

    def _advance(self, rows: int) -> None:
        if self._bar is not None:
            self._bar.advance(rows)


def score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    configs: Sequence[dict[str, Any]],
    names: Sequence[str],
    batch_size: int,
    max_length: int | None,
    limit: int | None,
    seed: int,
) -> TaskScores:
    """Run tasks given as configuration dicts and by the harness's names."""
    set_seed(seed)
    with _quiet():
        loaded = _load(configs, names, seed)
        lm = HarnessModel(
            pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=max_length
        )
        # simple_evaluate is this plus seconds of collecting the versions of everything installed
        results = lm_eval.evaluate(
            lm=lm,
            task_dict=loaded,
            limit=limit,
            bootstrap_iters=BOOTSTRAP_ITERS,
            log_samples=False,
        )
    metrics = {name: _scores(entry) for name, entry in results["results"].items()}
    return TaskScores(metrics, make_table(results))


def _scores(entry: dict[str, Any]) -> dict[str, float]:
    """Keys are `metric,filter` in the harness; a filter called none goes without saying."""
    return {
        key.removesuffix(",none"): float(value)
        for key, value in entry.items()
        if "," in key and isinstance(value, int | float)
    }


def _load(configs: Sequence[dict[str, Any]], names: Sequence[str], seed: int) -> dict[str, Any]:
    if names:
        console.log("reading the task list of lm-evaluation-harness, which takes some seconds")
    manager = TaskManager(include_defaults=bool(names))
    _check_names(manager, names)
    local = [ConfigurableTask(config=config) for config in configs]
    try:
        loaded = manager.load([*local, *names])
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ResourceError(
            f"the tasks {', '.join(names)} cannot be loaded: {reason}",
            hint="they are fetched from the network; local .jsonl files work without one",
        ) from error
    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config("num_fewshot", 0)
        task.set_fewshot_seed(seed)
    return loaded


def _check_names(manager: TaskManager, names: Sequence[str]) -> None:
    for name in names:
        if not manager.match_tasks([name]):
            near = difflib.get_close_matches(name, manager.all_tasks, n=3)
            raise UsageError(
                f"lm-evaluation-harness knows no task {name!r}",
                hint=(f"did you mean {', '.join(near)}? " if near else "")
                + "`lm-eval ls tasks` lists all; files end in .jsonl or .jsonl.gz",
            )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the harness's warnings, prints, bars and worker processes out of the way."""
    logger, start_bar, variable = logging.getLogger("lm_eval"), tqdm.__init__, "DISABLE_MULTIPROC"
    level, before = logger.level, os.environ.get(variable)
    logger.setLevel(logging.ERROR)
    tqdm.__init__ = partialmethod(start_bar, disable=True)
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
