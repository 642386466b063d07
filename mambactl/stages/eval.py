"""`eval`: how faithful a model is to its teacher on some text, and how it scores on tasks."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mambactl import console
from mambactl.checkpoint.load import load_model, load_tokenizer
from mambactl.checkpoint.resolve import resolve
from mambactl.checkpoint.summary import describe
from mambactl.checkpoint.vocabulary import require_same_tokens
from mambactl.data.format import encode_rows
from mambactl.data.load import load_rows
from mambactl.errors import CheckError, UsageError
from mambactl.measure.checks import Check, failures, parse_checks, require_known
from mambactl.measure.fidelity import SCALARS, fidelity
from mambactl.measure.tasks import (
    LocalTask,
    is_local,
    load_local_tasks,
    require_harness,
    score_tasks,
)
from mambactl.models.hybrid import HybridForCausalLM
from mambactl.recipe import EvalConfig
from mambactl.stages import StageResult
from mambactl.stages.placement import place
from mambactl.stages.results import save_results
from mambactl.stages.teacher import teacher_of

STAGE = "eval"


@dataclass(frozen=True)
class Inputs:
    """Everything that is read and checked before a model is loaded."""

    checks: list[Check]
    data: dict[str, list[dict[str, Any]]]
    tasks: list[LocalTask]
    teacher: str | None


def run(config: EvalConfig, source: str) -> StageResult:
    """Measure and print tables; a bound of `fail_under` that does not hold is a CheckError."""
    inputs = _read(config, source)
    model = _load(config, source)
    tokenizer = load_tokenizer(source, config.trust_remote_code)
    metrics: dict[str, Any] = {}
    if inputs.teacher is not None:
        same = resolve(inputs.teacher).path == resolve(source).path
        teacher = model if same else _load(config, inputs.teacher)
        metrics["teacher"] = inputs.teacher
        metrics["fidelity"] = _fidelity(config, inputs, model, teacher, tokenizer)
        _show_fidelity(source, inputs.teacher, metrics["fidelity"])
        del teacher
    if config.tasks:
        scores = score_tasks(
            model, tokenizer, config.tasks, config.batch_size, limit=config.limit, seed=config.seed
        )
        metrics["tasks"] = scores.metrics
        console.log(scores.table.rstrip())
    name = "+".join([*inputs.data, *(_label(task) for task in config.tasks)])
    save_results(STAGE, source, name, config, metrics)
    _check(inputs.checks, metrics)
    return StageResult(path=source, metrics=metrics)


def plan(config: EvalConfig, source: str) -> dict[str, Any]:
    """What would be measured; reads headers, data and task files, and no weights."""
    inputs = _read(config, source)
    device, dtype = place(config)
    found = describe(source)
    return {
        "source": found["checkpoint"],
        "parameters": found["parameters"],
        "mixers": found["mixers"],
        "teacher": inputs.teacher and describe(inputs.teacher)["checkpoint"],
        "documents": {name: len(rows) for name, rows in inputs.data.items()},
        "tasks": {task.name: len(task.rows) for task in inputs.tasks}
        | {name: None for name in config.tasks if not is_local(name)},
        "checks": [str(check) for check in inputs.checks],
        "device": str(device),
        "dtype": str(dtype).removeprefix("torch."),
    }


def _read(config: EvalConfig, source: str) -> Inputs:
    if not config.data and not config.tasks:
        raise UsageError(
            "nothing to measure",
            hint="pass --data FILE (fidelity to the teacher), --tasks NAME,FILE.jsonl, or both",
        )
    checks = parse_checks(config.fail_under)
    if config.tasks:
        require_harness()
    tasks = load_local_tasks(config.tasks, config.limit)
    data = {
        name: load_rows([spec], config.limit)
        for name, spec in zip(_labels(config.data), config.data, strict=True)
    }
    if len(tasks) == len(config.tasks):
        # only the harness knows the metrics of its own tasks, and only once they are loaded
        known = {task.name: task.schema.metrics for task in tasks}
        require_known(checks, dict.fromkeys(data, SCALARS) | known)
    teacher = teacher_of(source, config.teacher, "--teacher") if data else None
    if teacher is not None:
        hint = "give a --teacher of the same family"
        require_same_tokens(
            source, teacher, "teacher", hint, trust_remote_code=config.trust_remote_code
        )
    return Inputs(checks, data, tasks, teacher)


def _load(config: EvalConfig, spec: str) -> HybridForCausalLM:
    device, dtype = place(config)
    return load_model(
        spec, device=str(device), dtype=dtype, trust_remote_code=config.trust_remote_code
    )


def _fidelity(
    config: EvalConfig,
    inputs: Inputs,
    model: HybridForCausalLM,
    teacher: HybridForCausalLM,
    tokenizer: Any,
) -> dict[str, Any]:
    return {
        name: fidelity(
            model,
            teacher,
            [example.input_ids for example in encode_rows(rows, tokenizer)],
            config.max_length,
            config.batch_size,
        )
        for name, rows in inputs.data.items()
    }


def _show_fidelity(source: str, teacher: str, measured: dict[str, Any]) -> None:
    """One column per data set; lines carry the names that `fail_under` takes."""
    found = list(measured.values())
    lines = [("tokens", *(f"{one['tokens']:,}" for one in found))]
    lines += [(name, *(f"{one[name]:.4f}" for one in found)) for name in SCALARS]
    buckets = dict.fromkeys(bucket for one in found for bucket in one["by_position"])
    for name in ("kl", "agreement"):
        for bucket in buckets:
            parts = [one["by_position"].get(bucket) for one in found]
            cells = ("-" if part is None else f"{part[name]:.4f}" for part in parts)
            lines.append((f"{name} at {bucket}", *cells))
    console.table(f"{source} against {teacher}, per token", ("", *measured), lines)


def _check(checks: Sequence[Check], metrics: dict[str, Any]) -> None:
    scalars = {
        name: {key: found[key] for key in SCALARS}
        for name, found in metrics.get("fidelity", {}).items()
    }
    scores = scalars | metrics.get("tasks", {})
    require_known(checks, {name: list(values) for name, values in scores.items()})
    if failed := failures(checks, scores):
        raise CheckError("; ".join(failed))


def _labels(specs: Sequence[str]) -> list[str]:
    """Short names of data sets, or the specs where two would be called the same."""
    short = [_label(spec) for spec in specs]
    return short if len(set(short)) == len(short) else list(specs)


def _label(spec: str) -> str:
    name = Path(spec).name.removesuffix(".gz")
    return name.rsplit(".", 1)[0] if name.endswith((".jsonl", ".parquet", ".txt")) else spec
