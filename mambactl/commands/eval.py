"""`eval`: how faithful a model is to its teacher, what it recalls, and how it scores on tasks.

What is measured is the table of probes; here is what they have in common.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from mambactl import console
from mambactl.checkpoint.contents import describe
from mambactl.checkpoint.load import load_model, load_tokenizer
from mambactl.checkpoint.resolve import resolve
from mambactl.checkpoint.teacher import named_teacher, teacher_of
from mambactl.checkpoint.vocabulary import model_config, require_same_tokens, without_padding
from mambactl.errors import CheckError, MambactlError, ModelError, UsageError
from mambactl.evaluation.controls import ablated, require_branch, windowed_attention
from mambactl.evaluation.fidelity import Variant
from mambactl.evaluation.probes import PROBES, EvalConfig
from mambactl.evaluation.probes.probe import (
    AGAINST,
    STUDENT,
    TEACHER,
    AnyProbe,
    Asked,
    Subject,
)
from mambactl.evaluation.sequences import CACHE, SEQUENCES, sequences_of, show_sequences
from mambactl.generation.dealer import Dealer
from mambactl.json_values import JsonObject
from mambactl.models.byte_weights import round_to_bytes
from mambactl.models.device_map import Rooms
from mambactl.models.hybrid import HybridForCausalLM
from mambactl.present import present
from mambactl.ranks import is_main, placement
from mambactl.report.entries import WEIGHTS
from mambactl.report.results import save_results
from mambactl.report.thresholds import Check, failures, parse_checks, require_known
from mambactl.stage_result import StageResult

STAGE = "eval"


@dataclass(frozen=True)
class Inputs:
    """Everything that is read and checked before a model is loaded.

    `read` is what every probe that is asked for has read, by name. `replaced` are the KV heads
    by layer whose attention only the teacher has, where a control asks.
    """

    checks: list[Check]
    read: JsonObject
    teacher: str | None
    replaced: dict[int, tuple[int, ...]]

    def probes(self) -> Iterator[tuple[AnyProbe, Any]]:
        """Requested probes in the order of the measurement, each with its inputs."""
        asked = [PROBES[name] for name in self.read]
        for probe in sorted(asked, key=lambda each: each.alone):
            yield probe, self.read[probe.name]


def run(config: EvalConfig, source: str) -> StageResult:
    """Measure and print tables; a bound of `fail_under` that does not hold is a CheckError."""
    result = measure(config, source)
    # several processes have one result
    if is_main():
        check(config, result.metrics)
    return result


def measure(config: EvalConfig, source: str) -> StageResult:
    """Measure, print tables and keep the numbers, whatever they are."""
    inputs, dealer = _read(config, source), Dealer.of_run()
    subject = _subject(config, inputs, source, dealer)
    dtype = str(subject.model.dtype).removeprefix("torch.")
    # before models are let go of
    cache = sequences_of(subject.model, subject.teacher)
    metrics: JsonObject = {}
    if inputs.teacher is not None:
        metrics[TEACHER] = inputs.teacher
    if config.against is not None:
        metrics[AGAINST] = {"model": config.against}
    if config.weights != "auto":
        metrics[WEIGHTS] = config.weights
    parts = []
    for probe, own in inputs.probes():
        if probe.alone:
            subject = subject.alone()
        found = probe.measure(config, own, subject)
        if not dealer.leads:
            continue
        probe.show(subject, found)
        probe.keep(metrics, found)
        parts += probe.labels(own)
    dealer.finish()
    if not dealer.leads:
        return StageResult(path=source)
    if cache:
        show_sequences(f"{source} in {dtype}", cache)
        metrics[CACHE] = {"dtype": dtype, SEQUENCES: cache}
    name = "+".join(parts) + ("" if config.weights == "auto" else f"-{config.weights}")
    kept = save_results(STAGE, source, name, config, metrics)
    for probe, _ in inputs.probes():
        probe.draw(config, source, metrics, kept)
    return StageResult(path=source, metrics=metrics, kept=kept)


def plan(config: EvalConfig, source: str) -> JsonObject:
    """Describe the measurements; reads headers, data and task files, and no weights."""
    inputs = _read(config, source)
    device, dtype = placement(config)
    found = describe(source)
    probes: JsonObject = {}
    for name, probe in PROBES.items():
        probes |= probe.plan(inputs.read.get(name))
    return {
        "source": found["checkpoint"],
        "parameters": found["parameters"],
        "mixers": found["mixers"],
        "teacher": inputs.teacher and describe(inputs.teacher)["checkpoint"],
        **probes,
        "weights": config.weights,
        "controls": _control_names(config),
        "checks": [str(check) for check in inputs.checks],
        "device": str(device),
        "dtype": str(dtype).removeprefix("torch."),
    }


def check(config: EvalConfig, metrics: JsonObject) -> None:
    """Raise CheckError where a bound of `fail_under` does not hold."""
    checks = parse_checks(config.fail_under)
    scores: dict[str, dict[str, float]] = {}
    for probe in PROBES.values():
        scores |= probe.scores(metrics)
    require_known(checks, {name: list(values) for name, values in scores.items()})
    if failed := failures(checks, scores):
        raise CheckError("; ".join(failed))


def _read(config: EvalConfig, source: str) -> Inputs:
    probes = [probe for probe in PROBES.values() if probe.asked(config)]
    config.require_coherent()
    checks = parse_checks(config.fail_under)
    asked = Asked(source, config)
    read = {probe.name: probe.read(config, asked) for probe in probes}
    asked.teacher = _teacher(config, source, probes)
    _require_known(checks, probes, asked.teacher, read)
    for branch in config.ablate:
        require_branch(model_config(source).mixers, branch)
    replaced = _replaced(source, asked.teacher) if config.control and asked.teacher else {}
    if config.against:
        hint = "compare students that share a tokenizer"
        trusted = config.trust_remote_code
        require_same_tokens(source, config.against, AGAINST, hint, trust_remote_code=trusted)
    for probe in probes:
        probe.match(config, asked)
    _warn_of_length(asked)
    return Inputs(checks, read, asked.teacher, replaced)


def _require_known(
    checks: list[Check],
    probes: list[AnyProbe],
    teacher: str | None,
    read: JsonObject,
) -> None:
    found = [probe.known(read[probe.name], teacher) for probe in probes]
    # where one does not know, only the measurement tells
    if all(known is not None for known in found):
        require_known(
            checks, {group: keys for known in found for group, keys in (known or {}).items()}
        )


def _warn_of_length(asked: Asked) -> None:
    if not asked.longest:
        return
    ours = model_config(asked.source)
    if ours.attends and asked.longest > ours.max_position_embeddings:
        console.warn(
            f"{asked.longest} tokens are more than the {ours.max_position_embeddings} this model "
            "was made for"
        )


def _teacher(config: EvalConfig, source: str, probes: list[AnyProbe]) -> str | None:
    """Teacher for the comparison; some probes do without one that cannot be found."""
    asked = {probe.teacher for probe in probes}
    needed = "needed" in asked or config.control
    known = config.teacher or named_teacher(source)
    if not needed and not ("welcome" in asked and known):
        return None
    try:
        teacher = teacher_of(source, config.teacher, "--teacher", config.trust_remote_code)
    except MambactlError as error:
        if needed or config.teacher:
            raise
        console.warn(f"nothing is compared with a teacher: {error} ({error.hint})")
        return None
    hint = "give a --teacher of the same family"
    trusted = config.trust_remote_code
    require_same_tokens(
        source, teacher, "teacher", hint, trust_remote_code=trusted, padded=not trusted
    )
    return teacher


def _replaced(source: str, teacher: str) -> dict[int, tuple[int, ...]]:
    """KV heads that attend to all of the past in the teacher alone, by layer.

    Raises UsageError if there are none.
    """
    ours, theirs = (model_config(spec) for spec in (source, teacher))
    found = {}
    if ours.num_hidden_layers == theirs.num_hidden_layers:
        kept, whole = ours.attention_heads, theirs.attention_heads
        lost = {i: tuple(h for h in whole[i] if h not in kept[i]) for i in theirs.attention_layers}
        found = {index: heads for index, heads in lost.items() if heads}
    if not found:
        raise UsageError(
            f"{source} has no layer in which {teacher} has attention instead",
            "a window is the control of a converted model against the model it was made from",
        )
    return found


def _subject(config: EvalConfig, inputs: Inputs, source: str, dealer: Dealer) -> Subject:
    """Load every model once, also where two are the same."""
    model = _student(config, source)
    tokenizer = load_tokenizer(source, config.trust_remote_code)
    teacher = other = None
    if inputs.teacher is not None:
        same = resolve(inputs.teacher).path == resolve(source).path and config.weights == "auto"
        teacher = model if same else _load(config, inputs.teacher)
        if not config.trust_remote_code:
            # compared in the tokens that both have
            teacher = without_padding(teacher, model.config.vocab_size)
    if config.against is not None:
        shared = teacher is not None and resolve(config.against) == resolve(present(inputs.teacher))
        other = teacher if shared else _load(config, config.against)
    variants = _variants(config, inputs, model, teacher, other)
    return Subject(
        source=source,
        tokenizer=tokenizer,
        model=model,
        variants=variants,
        teacher_name=inputs.teacher,
        teacher=teacher,
        other_name=config.against,
        other=other,
        dealer=dealer,
    )


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
            Variant(
                present(teacher),
                partial(windowed_attention, present(teacher), inputs.replaced, *size),
            )
        )
    changes += [Variant(model, partial(ablated, model, branch)) for branch in config.ablate]
    students = {STUDENT: Variant(model)} | ({AGAINST: Variant(other)} if other else {})
    return students | dict(zip(_control_names(config), changes, strict=True))


def _student(config: EvalConfig, source: str) -> HybridForCausalLM:
    """The model that is measured, with the weights that it would decode with."""
    model = _load(config, source)
    if config.weights == "auto":
        return model
    if not isinstance(model, HybridForCausalLM):
        raise ModelError(
            f"{source} runs code of its own, whose weights stay as they are", "drop --weights"
        )
    round_to_bytes(model, config.weights)
    console.log(f"weights of linear layers rounded to {config.weights}, in the student alone")
    return model


def _load(config: EvalConfig, spec: str) -> HybridForCausalLM:
    device, dtype = placement(config)
    return load_model(spec, str(device), dtype, config.trust_remote_code, Rooms.of(config))
