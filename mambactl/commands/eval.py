"""`eval`: how faithful a model is to its teacher, what it recalls, and how it scores on tasks."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from mambactl import console
from mambactl.checkpoint.contents import describe
from mambactl.checkpoint.load import load_lineage, load_model, load_tokenizer
from mambactl.checkpoint.resolve import resolve
from mambactl.checkpoint.teacher import teacher_of
from mambactl.checkpoint.vocabulary import model_config, require_same_tokens
from mambactl.data.preferences import PairSet
from mambactl.data.sources import load_rows, set_name, set_names
from mambactl.decode.prompts import Prompt
from mambactl.errors import CheckError, UsageError
from mambactl.evaluation import agreement, needle, recall, rewards
from mambactl.evaluation.controls import ablated, require_branch, windowed_attention
from mambactl.evaluation.fidelity import SCALARS, Variant
from mambactl.evaluation.layers import require_layers
from mambactl.evaluation.probes import agreement_probe, task_probe
from mambactl.evaluation.probes.fidelity_probe import (
    AGAINST,
    STUDENT,
    measure_fidelity,
    show_layers,
    show_tests,
)
from mambactl.evaluation.probes.long_context import (
    LongInputs,
    keep_heatmap,
    measure_long,
    read_long,
    show_long,
)
from mambactl.evaluation.probes.preference_probe import (
    measure_preferences,
    read_preference_sets,
    show_preferences,
)
from mambactl.evaluation.probes.tables import show_fidelity, show_recall
from mambactl.evaluation.recall import RecallProbe, measure_recall, recall_probes
from mambactl.generation import decoding
from mambactl.models.hybrid import HybridForCausalLM
from mambactl.options import EvalConfig
from mambactl.ranks import place
from mambactl.report.results import save_results
from mambactl.report.thresholds import Check, failures, parse_checks, require_known
from mambactl.stage_result import StageResult

STAGE = "eval"
TEACHER = "teacher"
GENERATION = "generation"


@dataclass(frozen=True)
class Inputs:
    """Everything that is read and checked before a model is loaded.

    `replaced` are the layers in which only the teacher has attention, where a control asks.
    """

    checks: list[Check]
    data: dict[str, list[dict[str, Any]]]
    tasks: task_probe.TaskPlan
    prompts: list[Prompt]
    probes: list[RecallProbe]
    preferences: dict[str, PairSet]
    teacher: str | None
    replaced: list[int]
    long: LongInputs


def run(config: EvalConfig, source: str) -> StageResult:
    """Measure and print tables; a bound of `fail_under` that does not hold is a CheckError."""
    result = measure(config, source)
    check(config, result.metrics)
    return result


def measure(config: EvalConfig, source: str) -> StageResult:
    """Measure, print tables and keep the numbers, whatever they are."""
    inputs = _read(config, source)
    model = _load(config, source)
    tokenizer = load_tokenizer(source, config.trust_remote_code)
    metrics: dict[str, Any] = {}
    teacher = None
    if inputs.teacher is not None:
        same = resolve(inputs.teacher).path == resolve(source).path
        teacher = model if same else _load(config, inputs.teacher)
        metrics["teacher"] = inputs.teacher
    other = None
    if config.against is not None:
        shared = teacher is not None and resolve(config.against) == resolve(inputs.teacher)
        other = teacher if shared else _load(config, config.against)
        metrics[AGAINST] = {"model": config.against}
    variants = _variants(config, inputs, model, teacher, other)
    if inputs.data:
        found = measure_fidelity(config, inputs.data, variants, teacher, tokenizer)
        show_fidelity(source, inputs.teacher, found.measured)
        show_tests(source, config.against, found.tests)
        show_layers(source, found.layers)
        _keep(metrics, "fidelity", found.measured)
        found.keep(metrics)
    if inputs.probes:
        measured = _recall(config, inputs, variants, teacher)
        show_recall(source, measured, {probe.name: probe.chance for probe in inputs.probes})
        _keep(metrics, "recall", measured)
        for probe in inputs.probes:
            about = {"chance": probe.chance, "pairs": probe.pairs, "queries": probe.queries}
            metrics["recall"][probe.name] |= about
    students = {STUDENT: model, AGAINST: other, TEACHER: teacher if teacher is not model else None}
    models = {name: each for name, each in students.items() if each is not None}
    if inputs.long.names:
        metrics |= measure_long(config, inputs.long, models, TEACHER, tokenizer)
        show_long(source, metrics, list(models))
    shown = list(models)
    if inputs.preferences:
        pairs = measure_preferences(config, inputs.preferences, model, teacher)
        show_preferences(source, inputs.teacher, pairs)
        metrics["preferences"] = pairs
    if inputs.prompts:
        found = agreement_probe.measure(config, inputs.prompts, model, teacher, tokenizer)
        agreement_probe.show(source, inputs.teacher, found)
        metrics["generation"] = {GENERATION: found}
    del teacher, variants, other, models, students
    if config.tasks:
        metrics |= task_probe.measure(inputs.tasks, config, source, model, tokenizer)
    probes = [probe.name for probe in inputs.probes]
    tasks = [set_name(task) for task in config.tasks]
    written = [GENERATION] if inputs.prompts else []
    sets = [*inputs.data, *probes, *inputs.long.names, *inputs.preferences]
    parts = [*sets, *written, *tasks]
    kept = save_results(STAGE, source, "+".join(parts), config, metrics)
    if inputs.long.grid is not None:
        keep_heatmap(config, source, metrics["needle"], shown, kept)
    return StageResult(path=source, metrics=metrics, kept=kept)


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
        "preferences": {name: found.counts() for name, found in inputs.preferences.items()},
        "controls": _control_names(config),
        **inputs.long.plan,
        "tasks": inputs.tasks.rows(),
        "prompts": len(inputs.prompts),
        "checks": [str(check) for check in inputs.checks],
        "device": str(device),
        "dtype": str(dtype).removeprefix("torch."),
    }


def _read(config: EvalConfig, source: str) -> Inputs:
    if (config.control or config.ablate) and not (config.data or config.recall):
        raise UsageError("--control and --ablate measure nothing by themselves", "add --data FILE")
    if (config.against or config.per_layer) and not config.data:
        raise UsageError("--against and --per-layer compare on text", "add --data FILE")
    asked = (config.data, config.tasks, config.recall, config.needle, config.long_context_data)
    if not any((*asked, config.preferences, config.generation_agreement)):
        raise UsageError(
            "nothing to measure",
            hint="pass --data FILE (fidelity to the teacher), --tasks NAME,FILE.jsonl, "
            "--recall 1024, --needle 1024,4096, --preferences FILE, "
            "--generation-agreement PROMPTS, or several of them",
        )
    checks = parse_checks(config.fail_under)
    tasks = task_probe.read(config, source)
    prompts = []
    if config.generation_agreement:
        prompts = decoding.read_prompts(config.generation_agreement)[: config.limit]
    data = {
        name: load_rows([spec], config.limit)
        for name, spec in zip(set_names(config.data), config.data, strict=True)
    }
    probes = []
    if config.recall:
        tokenizer = load_tokenizer(source, config.trust_remote_code)
        probes = recall_probes(tokenizer, config.recall, config.recall_rows, config.seed)
    pairs = {}
    if config.preferences:
        tokenizer = load_tokenizer(source, config.trust_remote_code)
        pairs = read_preference_sets(config, tokenizer)
    known = tasks.metrics()
    if known is not None:
        # only the harness knows the metrics of its own tasks, and only once they are loaded
        known |= {probe.name: recall.SCALARS for probe in probes}
        known |= {"needle": needle.SCALARS} if config.needle else {}
        known |= dict.fromkeys(pairs, rewards.SCALARS)
        known |= {GENERATION: agreement.SCALARS} if prompts else {}
        require_known(checks, dict.fromkeys(data, SCALARS) | known)
    teacher = _teacher(config, source)
    for branch in config.ablate:
        require_branch(model_config(source).mixers, branch)
    replaced = _replaced(source, teacher) if config.control and teacher else []
    if config.against:
        hint = "compare students that share a tokenizer"
        trusted = config.trust_remote_code
        require_same_tokens(source, config.against, AGAINST, hint, trust_remote_code=trusted)
    if config.per_layer:
        for spec in filter(None, (source, config.against)):
            require_layers(model_config(spec), model_config(teacher))
    long = read_long(config, source, model_config(source), set_names(config.long_context_data))
    return Inputs(checks, data, tasks, prompts, probes, pairs, teacher, replaced, long)


def _teacher(config: EvalConfig, source: str) -> str | None:
    """What the model is compared with; recall and tasks mean something without it."""
    asked = (config.data, config.control, config.long_context_data, config.preferences)
    needed = any((*asked, config.generation_agreement))
    known = config.teacher or load_lineage(source) is not None
    if not needed and not ((config.recall or config.needle) and known):
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
    config: EvalConfig,
    inputs: Inputs,
    model: HybridForCausalLM,
    teacher: HybridForCausalLM | None,
    other: HybridForCausalLM | None,
) -> dict[str, Variant]:
    """The student, the one it is compared with, and the controls beside it."""
    changes = []
    if config.control:
        size = (config.control_window, config.control_sinks)
        changes.append(
            Variant(teacher, partial(windowed_attention, teacher, inputs.replaced, *size))
        )
    changes += [Variant(model, partial(ablated, model, branch)) for branch in config.ablate]
    students = {STUDENT: Variant(model)} | ({AGAINST: Variant(other)} if other else {})
    return students | dict(zip(_control_names(config), changes, strict=True))


def _load(config: EvalConfig, spec: str) -> HybridForCausalLM:
    device, dtype = place(config)
    return load_model(
        spec, device=str(device), dtype=dtype, trust_remote_code=config.trust_remote_code
    )


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
            elif name == AGAINST:
                metrics[AGAINST].setdefault(kind, {})[group] = dict(numbers)
            else:
                controls = metrics.setdefault("controls", {}).setdefault(name, {})
                controls.setdefault(kind, {})[group] = numbers


def check(config: EvalConfig, metrics: dict[str, Any]) -> None:
    """Raise CheckError where a bound of `fail_under` does not hold."""
    checks = parse_checks(config.fail_under)
    scalars = {
        name: {key: found[key] for key in names}
        for kind, names in (
            ("fidelity", SCALARS),
            ("recall", recall.SCALARS),
            ("preferences", rewards.SCALARS),
            (GENERATION, agreement.SCALARS),
        )
        for name, found in metrics.get(kind, {}).items()
    }
    if found := metrics.get("needle"):
        means = {key: found[STUDENT][f"mean_{key}"] for key in needle.SCALARS}
        scalars["needle"] = means
    scores = scalars | metrics.get("tasks", {})
    require_known(checks, {name: list(values) for name, values in scores.items()})
    if failed := failures(checks, scores):
        raise CheckError("; ".join(failed))
