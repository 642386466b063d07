"""`distill`: align every mixer with the attention it replaced, then match the teacher's logits."""

from pathlib import Path
from typing import Any

from mambactl import console
from mambactl.checkpoint.vocabulary import model_config
from mambactl.errors import UsageError
from mambactl.models.config import HybridConfig
from mambactl.models.hybrid import HybridForCausalLM
from mambactl.recipe import DistillConfig
from mambactl.stages import StageResult
from mambactl.stages.training import Job, plan_training, report_phases
from mambactl.train.alignment import AlignmentObjective, misfit, replaced_layers
from mambactl.train.loop import Phase, train
from mambactl.train.objectives import LogitsObjective
from mambactl.train.optimizer import mixer_parameters, rest_parameters

STAGE = "distill"


def run(
    config: DistillConfig,
    source: str,
    out: Path | None,
    *,
    resume: bool = False,
    force: bool = False,
) -> StageResult:
    """Train the hybrid at `source` towards its teacher and write the result to `out`."""
    job = Job.of(STAGE, config, source)
    folder = job.folder(out, resume, force)
    steps = phase_steps(config)
    rows = job.rows(job.tokenizer())
    student = job.student()
    teacher = job.teacher()
    phases = _phases(job, config, student, teacher, steps)
    with folder.open(resume, force):
        reports = train(student, phases, rows, config, folder)
        metrics = report_phases(reports)
        job.save(student, folder, job.teacher_spec(), metrics)
    console.log(f"wrote {out}")
    return StageResult(str(out), metrics)


def plan(config: DistillConfig, source: str) -> dict[str, Any]:
    """Resolve everything and say what would run; writes nothing."""
    job = Job.of(STAGE, config, source)
    planned = plan_training(job)
    _require_mixers(source, planned["mixers"])
    steps = phase_steps(config)
    _require_fit(steps, model_config(source), model_config(job.teacher_spec()))
    return planned | {"phases": steps}


def phase_steps(config: DistillConfig) -> dict[str, int]:
    """Optimiser steps of each phase, `max_steps` together; a phase of none is left out."""
    total, order = config.max_steps, list(dict.fromkeys(config.stages))
    if not order:
        raise UsageError("no phase to run", "give --stages align,logits or one of them")
    if len(order) == 1:
        return {order[0]: total}
    if order != ["align", "logits"]:
        raise UsageError("align must come before logits", "give --stages align,logits")
    align = total // 2 if config.align_steps is None else config.align_steps
    if align > total:
        raise UsageError(
            f"align_steps {align} is more than max_steps {total}", "max_steps counts both phases"
        )
    steps = {"align": align, "logits": total - align}
    return {name: count for name, count in steps.items() if count}


def _phases(
    job: Job,
    config: DistillConfig,
    student: HybridForCausalLM,
    teacher: HybridForCausalLM,
    steps: dict[str, int],
) -> list[Phase]:
    _require_mixers(job.source, student.config.mixers)
    _require_fit(steps, student.config, teacher.config)
    console.log(f"{len(replaced_layers(student.config))} mixers follow {job.teacher_spec()}")
    mixers, rest = mixer_parameters(student), rest_parameters(student)
    phases = []
    if "align" in steps:
        aligned = AlignmentObjective(student, teacher, job.amp)
        phases.append(Phase("align", steps["align"], aligned, [(mixers, config.align_lr)]))
    if "logits" in steps:
        weights = (config.kl_weight, config.ce_weight, config.temperature)
        matched = LogitsObjective(student, teacher, *weights, amp=job.amp)
        parts = [(mixers, config.lr)] + ([(rest, config.rest_lr)] if config.rest_lr else [])
        phases.append(Phase("logits", steps["logits"], matched, parts))
    return phases


def _require_fit(steps: dict[str, int], student: HybridConfig, teacher: HybridConfig) -> None:
    problem = misfit(student, teacher)
    if "align" in steps and problem:
        raise UsageError(f"mixers cannot be aligned: {problem}", "use --stages logits")


def _require_mixers(source: str, mixers: list[str]) -> None:
    if all(name == "attention" for name in mixers):
        raise UsageError(
            f"{source} has no Mamba layer to distill", f"first: mambactl convert {source}"
        )
