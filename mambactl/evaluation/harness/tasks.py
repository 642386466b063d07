"""Tasks that are measured: local JSON Lines files, and what lm-evaluation-harness knows by name."""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import islice
from pathlib import Path

from mambactl.data.row_containers import rows_of
from mambactl.data.row_files import require_there
from mambactl.errors import ResourceError, UsageError
from mambactl.evaluation.harness.schemas import (
    MC2_SCHEMA,
    Row,
    Schema,
    as_in_harness,
    check_row,
    schema_of,
)
from mambactl.json_values import JsonObject
from mambactl.options.fields import BatchSize
from mambactl.present import present
from mambactl.requirements import install_line

SUFFIXES = (".jsonl.gz", ".jsonl")
POOLS = "fewshot"
SUBJECT = "subject"
# tasks of the harness whose local set has another name, with the schema where it is another
LOCAL_NAMES: dict[str, tuple[str, Schema | None]] = {
    "truthfulqa_mc1": ("truthfulqa_mc", None),
    "truthfulqa_mc2": ("truthfulqa_mc", MC2_SCHEMA),
}


@dataclass(frozen=True)
class Pool:
    """Rows that worked examples of a prompt are taken from.

    `own`: they are the rows that are asked, and the harness leaves out the one that is. `ordered`:
    the first are taken, not drawn. Rows with a subject are for questions of theirs alone.
    """

    rows: list[Row]
    own: bool = False
    ordered: bool = False


@dataclass(frozen=True)
class LocalTask:
    """A task read from a file."""

    name: str
    schema: Schema
    rows: list[Row]
    pool: Pool | None = None

    def config(self) -> JsonObject:
        """The configuration dict that lm-evaluation-harness builds the task from."""
        from datasets import Dataset

        splits = {"test": Dataset.from_list(self.rows)}
        config = {
            **self.schema.config,
            "task": self.name,
            "custom_dataset": lambda **_: dict(splits),
            "test_split": "test",
        }
        if self.pool is not None and self.pool.own:
            config["fewshot_split"] = "test"
        elif self.pool is not None:
            splits[POOLS] = Dataset.from_list(self.pool.rows)
            config["fewshot_split"] = POOLS
            sampler = "first_n" if self.pool.ordered else "default"
            given = self.schema.config.get("fewshot_config", {})
            config["fewshot_config"] = {**given, "sampler": sampler}
        return config


@dataclass(frozen=True)
class Wanted:
    """A task to measure: a file that was read, or a name of the harness.

    `shots` None is what is asked for in general. `optional`: without it the others are measured.
    """

    name: str
    local: LocalTask | None = None
    shots: int | None = None
    optional: bool = False


@dataclass(frozen=True)
class HarnessOptions:
    """Options of running tasks, with names and defaults of lm-evaluation-harness.

    `requests` is a folder for prompts that were made, `answers` a file for a model's answers.
    `batch_size` "auto" fills passes by tokens. `by_document`: scores of every document are wanted.
    """

    num_fewshot: int | None = None
    apply_chat_template: bool = False
    fewshot_as_multiturn: bool | None = None
    system_instruction: str | None = None
    limit: int | None = None
    batch_size: BatchSize = "auto"
    max_length: int | None = None
    seed: int = 0
    fewshot_seed: int = 1234
    requests: Path | None = None
    answers: Path | None = None
    log_samples: bool = False
    by_document: bool = False
    task_dir: str | None = None


def is_local(spec: str) -> bool:
    """True if a task is a local file rather than a name."""
    return spec.endswith(SUFFIXES)


def find_local(name: str, folder: str | None) -> tuple[Path, Schema | None] | None:
    """The file in a folder that holds a task of the harness, and its schema if not its columns'."""
    if folder is None:
        return None
    base, schema = LOCAL_NAMES.get(name, (name, None))
    for stem, kind in ((name, None), (base, schema)):
        for suffix in SUFFIXES:
            path = Path(folder).expanduser() / f"{stem}{suffix}"
            if path.is_file():
                return path, kind
    return None


def matching(pattern: str, folder: str | None) -> list[str]:
    """Names of a folder's files that a pattern with `*`, `?` or `[` stands for, sorted."""
    if folder is None or not any(letter in pattern for letter in "*?["):
        return []
    names = {_stem(path) for path in Path(folder).expanduser().iterdir() if is_local(path.name)}
    # a file of examples for another file's questions is no task
    return sorted(name for name in names if fnmatchcase(name, pattern) and name[-4:] != "_dev")


def load_local_task(
    path: str,
    limit: int | None = None,
    shots: int = 0,
    name: str | None = None,
    schema: Schema | None = None,
) -> LocalTask:
    """Read a `.jsonl` or `.jsonl.gz` file and check every row; UsageError names the row.

    With `shots` there is a pool: `fewshot/NAME` or `NAME_dev` beside the file, else its own rows.
    """
    found = None if shots == 0 else _pool_file(Path(path))
    # the harness draws from all rows, whatever number is asked
    rows, schema = _read(path, None if shots and found is None else limit, schema)
    pool = None
    if shots and found is None:
        pool = Pool(rows, own=True)
    elif shots:
        beside = present(found)
        ordered = beside.parent.name != POOLS
        pool = Pool(_read(str(beside), None, schema)[0], ordered=ordered)
    if pool is not None:
        _check_pool(path, rows, pool, shots)
    name = name or _stem(Path(path))
    return LocalTask(name, as_in_harness(schema, name), rows, pool)


def require_distinct(names: Sequence[str]) -> None:
    """Raise UsageError where two tasks have one name."""
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UsageError(
            f"two tasks are called {twice[0]}, and results are kept by name",
            hint="rename one of the files, or measure them in two runs",
        )


def require_harness() -> None:
    """Raise ResourceError unless lm-evaluation-harness is installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ResourceError(
            "tasks need lm-evaluation-harness, which is not installed",
            hint=install_line("lm_eval"),
        )


def _stem(path: Path) -> str:
    return path.name.removesuffix(".gz").removesuffix(".jsonl")


def _read(path: str, limit: int | None, schema: Schema | None) -> tuple[list[Row], Schema]:
    require_there(path)
    rows = list(islice(rows_of(path, None), limit))
    if not rows:
        raise UsageError(f"{path} is empty", hint="a task file needs at least one row")
    schema = schema or schema_of(path, *rows[0])
    for number, row in rows:
        check_row(path, number, row, schema)
    columns = list(schema.columns)
    if SUBJECT not in columns and all(isinstance(row.get(SUBJECT), str) for _, row in rows):
        columns.append(SUBJECT)
    return [{key: row[key] for key in columns} for _, row in rows], schema


def _pool_file(path: Path) -> Path | None:
    stem = _stem(path)
    # MMLU's worked examples are for its validation questions too
    names = dict.fromkeys((stem, stem.removesuffix("_validation")))
    candidates = [path.parent / POOLS / name for name in names]
    candidates += [path.parent / f"{name}_dev" for name in names]
    for candidate in candidates:
        for suffix in SUFFIXES:
            file = candidate.with_name(candidate.name + suffix)
            if file.is_file():
                return file
    return None


def _check_pool(path: str, rows: Sequence[Row], pool: Pool, shots: int) -> None:
    subjects = {row.get(SUBJECT) for row in pool.rows}
    if len(subjects) == 1:
        least = len(pool.rows)
    else:
        asked = {row.get(SUBJECT) for row in rows}
        least = min(sum(row[SUBJECT] == subject for row in pool.rows) for subject in asked)
    if least - pool.own < shots:
        raise UsageError(
            f"{path}: {shots} worked examples are asked for, and there are {least - pool.own}",
            hint="lower --num-fewshot, or put more rows into fewshot/NAME.jsonl beside the file",
        )
