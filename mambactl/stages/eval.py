"""`eval`: how faithful a model is to its teacher, what it recalls, and how it scores on tasks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mambactl import console
from mambactl.checkpoint.load import load_lineage, load_model, load_tokenizer
from mambactl.checkpoint.resolve import resolve
from mambactl.checkpoint.summary import describe
from mambactl.checkpoint.vocabulary import model_config, require_same_tokens
from mambactl.data.format import encode_rows
from mambactl.data.load import load_rows
from mambactl.decode.prompts import Prompt
from mambactl.errors import CheckError, UsageError
from mambactl.measure import agreement, recall
from mambactl.measure.checks import Check, failures, parse_checks, require_known
from mambactl.measure.controls import ablated, require_branch, windowed_attention
from mambactl.measure.fidelity import SCALARS, Variant, compare
from mambactl.measure.recall import RecallProbe, measure_recall, recall_probes
from mambactl.models.hybrid import HybridForCausalLM
from mambactl.recipe import EvalConfig
from mambactl.stages import StageResult, decoding, eval_generation, eval_tasks
from mambactl.stages.eval_report import show_fidelity, show_recall
from mambactl.stages.placement import place
from mambactl.stages.results import save_results
from mambactl.stages.teacher import teacher_of

STAGE = "eval"
STUDENT, TEACHER = "student", "teacher"
GENERATION = "generation"


@dataclass(frozen=True)
class Inputs:
    """Everything that is read and checked before a model is loaded.

    `replaced` are the layers in which only the teacher has attention, where a control asks.
    """

    checks: list[Check]
    data: dict[str, list[dict[str, Any]]]
    tasks: eval_tasks.TaskPlan
    prompts: list[Prompt]
    probes: list[RecallProbe]
    teacher: str | None
    replaced: list[int]


def run(config: EvalConfig, source: str) -> StageResult:
    """Measure and print tables; a bound of `fail_under` that does not hold is a CheckError."""
    inputs = _read(config, source)
    model = _load(config, source)
    tokenizer = load_tokenizer(source, config.trust_remote_code)
    metrics: dict[str, Any] = {}
    teacher = None
    if inputs.teacher is not None:
        same = resolve(inputs.teacher).path == resolve(source).path
        teacher = model if same else _load(config, inputs.teacher)
        metrics["teacher"] = inputs.teacher
    variants = _variants(config, inputs, model, teacher)
    if inputs.data:
        measured = _fidelity(config, inputs, variants, teacher, tokenizer)
        show_fidelity(source, inputs.teacher, measured)
        _keep(metrics, "fidelity", measured)
    if inputs.probes:
        measured = _recall(config, inputs, variants, teacher)
        show_recall(source, measured, {probe.name: probe.chance for probe in inputs.probes})
        _keep(metrics, "recall", measured)
        for probe in inputs.probes:
            about = {"chance": probe.chance, "pairs": probe.pairs, "queries": probe.queries}
            metrics["recall"][probe.name] |= about
    if inputs.prompts:
        found = eval_generation.measure(config, inputs.prompts, model, teacher, tokenizer)
        eval_generation.show(source, inputs.teacher, found)
        metrics["generation"] = {GENERATION: found}
    del teacher, variants
    if config.tasks:
        metrics["tasks"] = eval_tasks.measure(inputs.tasks, config, source, model, tokenizer)
    probes = [probe.name for probe in inputs.probes]
    written = [GENERATION] if inputs.prompts else []
    name = "+".join([*inputs.data, *probes, *written, *(_label(task) for task in config.tasks)])
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
        "recall": {
            probe.name: {"rows": len(probe.input_ids), "chance": probe.chance}
            for probe in inputs.probes
        },
        "controls": _control_names(config),
        "tasks": inputs.tasks.rows(),
        "prompts": len(inputs.prompts),
        "checks": [str(check) for check in inputs.checks],
        "device": str(device),
        "dtype": str(dtype).removeprefix("torch."),
    }


def _read(config: EvalConfig, source: str) -> Inputs:
    if (config.control or config.ablate) and not (config.data or config.recall):
        raise UsageError("--control and --ablate measure nothing by themselves", "add --data FILE")
    if not (config.data or config.tasks or config.recall or config.generation_agreement):
        raise UsageError(
            "nothing to measure",
            hint="pass --data FILE (fidelity to the teacher), --tasks NAME,FILE.jsonl, "
            "--recall 1024, --generation-agreement PROMPTS, or several of them",
        )
    checks = parse_checks(config.fail_under)
    tasks = eval_tasks.read(config, source)
    prompts = []
    if config.generation_agreement:
        prompts = decoding.read_prompts(config.generation_agreement)[: config.limit]
    data = {
        name: load_rows([spec], config.limit)
        for name, spec in zip(_labels(config.data), config.data, strict=True)
    }
    probes = []
    if config.recall:
        tokenizer = load_tokenizer(source, config.trust_remote_code)
        probes = recall_probes(tokenizer, config.recall, config.recall_rows, config.seed)
    known = tasks.metrics()
    if known is not None:
        # only the harness knows the metrics of its own tasks, and only once they are loaded
        known |= {probe.name: recall.SCALARS for probe in probes}
        known |= {GENERATION: agreement.SCALARS} if prompts else {}
        require_known(checks, dict.fromkeys(data, SCALARS) | known)
    teacher = _teacher(config, source)
    for branch in config.ablate:
        require_branch(model_config(source).mixers, branch)
    replaced = _replaced(source, teacher) if config.control and teacher else []
    return Inputs(checks, data, tasks, prompts, probes, teacher, replaced)


def _teacher(config: EvalConfig, source: str) -> str | None:
    """What the model is compared with; recall and tasks mean something without it."""
    needed = config.data or config.control or config.generation_agreement
    known = config.teacher or load_lineage(source) is not None
    if not needed and not (config.recall and known):
        return None
    teacher = teacher_of(source, config.teacher, "--teacher")
    hint = "give a --teacher of the same family"
    require_same_tokens(
        source, teacher, "teacher", hint, trust_remote_code=config.trust_remote_code
    )
    return teacher


def _replaced(source: str, teacher: str) -> list[int]:
    """Layers that are attention in the teacher alone; raises UsageError if there are none."""
    ours, theirs = (model_config(spec).mixers for spec in (source, teacher))
    found = [
        index
        for index, pair in enumerate(zip(ours, theirs, strict=False))
        if pair[0] != "attention" and pair[1] == "attention"
    ]
    if len(ours) != len(theirs) or not found:
        raise UsageError(
            f"{source} has no layer in which {teacher} has attention instead",
            "a window is the control of a converted model against the model it was made from",
        )
    return found


def _control_names(config: EvalConfig) -> list[str]:
    window = f"window {config.control_window}+{config.control_sinks}"
    return ([window] if config.control else []) + [f"no {branch}" for branch in config.ablate]


def _variants(
    config: EvalConfig, inputs: Inputs, model: HybridForCausalLM, teacher: HybridForCausalLM | None
) -> dict[str, Variant]:
    """The student and the controls beside it."""
    changes = []
    if config.control:
        size = (config.control_window, config.control_sinks)
        changes.append(
            Variant(teacher, partial(windowed_attention, teacher, inputs.replaced, *size))
        )
    changes += [Variant(model, partial(ablated, model, branch)) for branch in config.ablate]
    return {STUDENT: Variant(model)} | dict(zip(_control_names(config), changes, strict=True))


def _load(config: EvalConfig, spec: str) -> HybridForCausalLM:
    device, dtype = place(config)
    return load_model(
        spec, device=str(device), dtype=dtype, trust_remote_code=config.trust_remote_code
    )


def _fidelity(
    config: EvalConfig,
    inputs: Inputs,
    variants: Mapping[str, Variant],
    teacher: HybridForCausalLM,
    tokenizer: Any,
) -> dict[str, dict[str, Any]]:
    """Data set -> variant -> numbers."""
    return {
        name: compare(
            variants,
            teacher,
            [example.input_ids for example in encode_rows(rows, tokenizer)],
            config.max_length,
            config.rows,
        )
        for name, rows in inputs.data.items()
    }


def _recall(
    config: EvalConfig,
    inputs: Inputs,
    variants: Mapping[str, Variant],
    teacher: HybridForCausalLM | None,
) -> dict[str, dict[str, Any]]:
    """Probe -> variant or teacher -> numbers."""
    models = dict(variants)
    if teacher is not None and teacher is not variants[STUDENT].model:
        models[TEACHER] = Variant(teacher)
    measured: dict[str, dict[str, Any]] = {probe.name: {} for probe in inputs.probes}
    with console.progress("recall", len(inputs.probes) * len(models)) as task:
        for probe in inputs.probes:
            for name, variant in models.items():
                with variant.during():
                    found = measure_recall(variant.model, probe, config.rows)
                measured[probe.name][name] = found
                task.advance()
    return measured


def _keep(
    metrics: dict[str, Any], kind: str, measured: Mapping[str, Mapping[str, dict[str, Any]]]
) -> None:
    """The student's numbers under `kind`, those of others beside it or under `controls`."""
    own = metrics.setdefault(kind, {})
    for group, found in measured.items():
        for name, numbers in found.items():
            if name == STUDENT:
                own[group] = dict(numbers)
            elif name == TEACHER:
                own[group]["teacher"] = numbers
            else:
                controls = metrics.setdefault("controls", {}).setdefault(name, {})
                controls.setdefault(kind, {})[group] = numbers


def _check(checks: Sequence[Check], metrics: dict[str, Any]) -> None:
    scalars = {
        name: {key: found[key] for key in names}
        for kind, names in (
            ("fidelity", SCALARS),
            ("recall", recall.SCALARS),
            (GENERATION, agreement.SCALARS),
        )
        for name, found in metrics.get(kind, {}).items()
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
