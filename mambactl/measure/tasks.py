"""Task scores: local JSON Lines files become tasks of lm-evaluation-harness, which does the rest.

A file's columns decide what its rows are: `mc` (query, choices, gold), `mc+partial` (mc with
context_options and one continuation), `lm` (context, continuation) and `gen` (lm with answer,
aliases or subject). Parts are joined by one space.
"""

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mambactl.data.load import read_rows
from mambactl.errors import ResourceError, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from mambactl.measure.harness import TaskScores

Row = dict[str, Any]
SUFFIXES = (".jsonl", ".jsonl.gz")

_GREEDY = {"do_sample": False, "temperature": 0.0}
_EXACT_MATCH = {
    "metric": "exact_match",
    "aggregation": "mean",
    "higher_is_better": True,
    "ignore_case": True,
}


def _metrics(**higher_is_better: bool) -> list[dict[str, Any]]:
    return [
        {
            "metric": name,
            "aggregation": "perplexity" if name == "perplexity" else "mean",
            "higher_is_better": better,
        }
        for name, better in higher_is_better.items()
    ]


def _spaced_continuation(row: Row) -> str:
    # the harness joins context and target of a loglikelihood request without a delimiter
    return f" {row['continuation']}"


MC = {
    "output_type": "multiple_choice",
    "doc_to_text": "query",
    "doc_to_choice": "choices",
    "doc_to_target": "gold",
    "metric_list": _metrics(acc=True, acc_norm=True),
}

# as the harness writes WinoGrande: the text is the gold index, the choices are contexts
MC_PARTIAL = {
    "output_type": "multiple_choice",
    "doc_to_text": "gold",
    "doc_to_choice": "context_options",
    "doc_to_target": "continuation",
    "metric_list": _metrics(acc=True),
}

LM = {
    "output_type": "loglikelihood",
    "doc_to_text": "context",
    "doc_to_target": _spaced_continuation,
    "metric_list": _metrics(acc=True, perplexity=False),
}

# the last number of the answer, as the harness's flexible extraction for GSM8K
GEN_NUMBER = {
    "output_type": "generate_until",
    "doc_to_text": "context",
    "doc_to_target": "answer",
    "generation_kwargs": {"until": ["Question:"], **_GREEDY},
    "filter_list": [
        {
            "name": "none",
            "filter": [
                {
                    "function": "regex",
                    "group_select": -1,
                    "regex_pattern": r"(-?[$0-9.,]{2,})|(-?[0-9]+)",
                },
                {"function": "take_first"},
            ],
        }
    ],
    "metric_list": [{**_EXACT_MATCH, "regexes_to_ignore": [",", r"\$", r"\.$"]}],
}

_STRIPPED = [
    {
        "name": "none",
        "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}],
    }
]

# any of several short answers, as the harness writes TriviaQA
GEN_ALIASES = {
    "output_type": "generate_until",
    "doc_to_text": "context",
    "doc_to_target": "aliases",
    "generation_kwargs": {"until": ["\n", ".", ","], "max_gen_toks": 32, **_GREEDY},
    "filter_list": _STRIPPED,
    "metric_list": [{**_EXACT_MATCH, "ignore_punctuation": True}],
}

GEN_LINE = {
    "output_type": "generate_until",
    "doc_to_text": "context",
    "doc_to_target": "continuation",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 64, **_GREEDY},
    "filter_list": _STRIPPED,
    "metric_list": [_EXACT_MATCH],
}


def _is_text(value: Any, _: Row) -> bool:
    return isinstance(value, str)


def _is_filled_text(value: Any, _: Row) -> bool:
    return isinstance(value, str) and bool(value)


def _is_texts(value: Any, _: Row) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(x, str) and x for x in value)


def _is_choice(value: Any, row: Row) -> bool:
    # bool is an int to Python, but a file that says `true` means something else
    if not isinstance(value, int) or isinstance(value, bool):
        return False
    options = [row[name] for name in ("choices", "context_options") if name in row]
    return all(isinstance(texts, list) and 0 <= value < len(texts) for texts in options)


@dataclass(frozen=True)
class Column:
    """One column of a schema: how it is described to a user and what makes a value valid."""

    meaning: str
    valid: Callable[[Any, Row], bool]


_TEXT = Column("text", _is_text)
_FILLED = Column("text that is not empty", _is_filled_text)
_TEXTS = Column("a list of texts that are not empty", _is_texts)
_MC_COLUMNS = {
    "query": _TEXT,
    "choices": _TEXTS,
    "gold": Column("the index of the right choice", _is_choice),
}
_LM_COLUMNS = {"context": _TEXT, "continuation": _FILLED}


@dataclass(frozen=True)
class Schema:
    """What rows of a kind hold, and the harness configuration that scores them."""

    name: str
    columns: dict[str, Column]
    config: dict[str, Any]

    @property
    def metrics(self) -> list[str]:
        """Names of the scores."""
        return [metric["metric"] for metric in self.config["metric_list"]]


# the first schema whose columns are all there is taken: the narrow ones come first
SCHEMAS = (
    Schema(
        "mc+partial",
        {**_MC_COLUMNS, "context_options": _TEXTS, "continuation": _FILLED},
        MC_PARTIAL,
    ),
    Schema("mc", _MC_COLUMNS, MC),
    Schema("gen", {**_LM_COLUMNS, "answer": _FILLED}, GEN_NUMBER),
    Schema("gen", {**_LM_COLUMNS, "aliases": _TEXTS}, GEN_ALIASES),
    Schema("gen", {**_LM_COLUMNS, "subject": _TEXT}, GEN_LINE),
    Schema("lm", _LM_COLUMNS, LM),
)


@dataclass(frozen=True)
class LocalTask:
    """A task read from a file."""

    name: str
    schema: Schema
    rows: list[Row]

    def config(self) -> dict[str, Any]:
        """The configuration dict that lm-evaluation-harness builds the task from."""
        from datasets import Dataset

        dataset = Dataset.from_list(self.rows)
        return {
            **self.schema.config,
            "task": self.name,
            "custom_dataset": lambda **_: {"test": dataset},
            "test_split": "test",
            "num_fewshot": 0,
        }


def is_local(spec: str) -> bool:
    """Whether a task is a file here rather than a name that the harness knows."""
    return spec.endswith(SUFFIXES)


def load_local_task(path: str, limit: int | None = None) -> LocalTask:
    """Read a `.jsonl` or `.jsonl.gz` file and check every row; UsageError names the row."""
    rows = list(islice(read_rows(path), limit))
    if not rows:
        raise UsageError(f"{path} is empty", hint="a task file needs at least one row")
    schema = _schema_of(path, *rows[0])
    for number, row in rows:
        _check_row(path, number, row, schema)
    name = Path(path).name.removesuffix(".gz").removesuffix(".jsonl")
    return LocalTask(name, schema, [{key: row[key] for key in schema.columns} for _, row in rows])


def load_local_tasks(specs: Sequence[str], limit: int | None = None) -> list[LocalTask]:
    """Read those of the tasks that are files; two files of one name are a UsageError."""
    tasks = [load_local_task(spec, limit) for spec in specs if is_local(spec)]
    names = [task.name for task in tasks]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UsageError(
            f"two task files are called {twice[0]}, and results are kept by name",
            hint="rename one of the files",
        )
    return tasks


def score_tasks(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    specs: Sequence[str],
    batch_size: int = 1,
    max_length: int | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> "TaskScores":
    """Score a model on files and on tasks that lm-evaluation-harness knows by name.

    `max_length` None is the context of the model. ResourceError when the harness is missing.
    """
    require_harness()
    from mambactl.measure import harness

    local = load_local_tasks(specs, limit)
    named = [spec for spec in specs if not is_local(spec)]
    configs = [task.config() for task in local]
    return harness.score(model, tokenizer, configs, named, batch_size, max_length, limit, seed)


def require_harness() -> None:
    """Raise ResourceError unless lm-evaluation-harness is installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ResourceError(
            "tasks need lm-evaluation-harness, which is not installed",
            hint='pip install "mambactl[eval]"',
        )


def _schema_of(path: str, number: int, row: Any) -> Schema:
    _check_object(path, number, row)
    for schema in SCHEMAS:
        if schema.columns.keys() <= row.keys():
            return schema
    known = "; ".join(f"{schema.name}: {', '.join(schema.columns)}" for schema in SCHEMAS)
    raise UsageError(
        f"{path}, row {number}: the columns {', '.join(row) or '(none)'} "
        "are of no known kind of task",
        hint=f"a task file has the columns of one of: {known}",
    )


def _check_object(path: str, number: int, row: Any) -> None:
    if not isinstance(row, dict):
        raise UsageError(
            f"{path}, row {number}: holds a {type(row).__name__}, not an object",
            hint="a task file has one JSON object per line",
        )


def _check_row(path: str, number: int, row: Any, schema: Schema) -> None:
    _check_object(path, number, row)
    if missing := [name for name in schema.columns if name not in row]:
        raise UsageError(
            f"{path}, row {number}: found the columns {', '.join(row) or '(none)'}, "
            f"but {', '.join(missing)} is missing",
            hint=f"every row of this {schema.name} file needs {', '.join(schema.columns)}",
        )
    for name, column in schema.columns.items():
        if not column.valid(row[name], row):
            raise UsageError(
                f"{path}, row {number}: `{name}` must be {column.meaning}",
                hint=f"every row of this {schema.name} file needs {', '.join(schema.columns)}",
            )
