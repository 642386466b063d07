"""`distill`: align every mixer with the attention it replaced, then match the teacher's logits.

In between, if asked, layers become recurrent step by step; at the end the student may write the
text on which it matches them.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch

from mambactl import console
from mambactl.checkpoint.load import load_lineage
from mambactl.checkpoint.vocabulary import model_config
from mambactl.commands.teacher_cache import cached_objective, read_record
from mambactl.data.mixture import names
from mambactl.data.pack import Row
from mambactl.data.row_files import is_on_hub
from mambactl.errors import UsageError
from mambactl.evaluation.recall import RecallProbe
from mambactl.json_values import JsonObject
from mambactl.models.config import HybridConfig
from mambactl.models.hybrid import HybridForCausalLM
from mambactl.options import DistillConfig
from mambactl.options.on_policy import STAGE as ON_POLICY
from mambactl.options.phase_steps import without_steps
from mambactl.present import of_kind, present
from mambactl.ranks import join, sharded
from mambactl.stage_result import StageResult
from mambactl.train.compiled import compile_blocks, compiles, release_blocks
from mambactl.train.drawn_prompts import DrawnPrompts, drawn_prompts
from mambactl.train.drawn_windows import DrawnWindows, with_window
from mambactl.train.epochs import with_steps
from mambactl.train.estimate import Estimate, estimate
from mambactl.train.held_out import HeldOut
from mambactl.train.job import Job
from mambactl.train.ledger import Evaluation, shown
from mambactl.train.loop import Phase, train
from mambactl.train.optimization import AlignmentObjective, AnyObjective, LogitsObjective
from mambactl.train.phases import PhasePlan, plan_phases, shapes_of
from mambactl.train.preview import plan_training
from mambactl.train.publish import (
    as_begun,
    dated,
    draw_ledger,
    report_phases,
    save_result,
    working_folder,
)
from mambactl.train.rows import held_out_rows, training_rows
from mambactl.train.run_lines import track
from mambactl.train.sharding import split_pair
from mambactl.train.sharing import share_frozen
from mambactl.train.stepwise import StandIns
from mambactl.train.student_rows import StudentRows
from mambactl.train.trainer import require_trackers
from mambactl.train.watched_recall import WatchedRecall, watched_probes

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
    config = as_begun(config, out, resume)
    job = Job.of(STAGE, config, source)
    _check_capture(job, config)
    if sharded():
        config.require_splittable()
    require_trackers(config)
    join(job.device)
    whole = job = dated(job, out, resume)
    folder = working_folder(job, out, resume, force)
    track(config, folder)
    ours, theirs = _configs(job)
    if config.epochs is None:
        # what cannot be done is said before the data is read
        plan_phases(config, ours, theirs, _ranking(source))
    tokenizer = job.tokenizer()
    rows: list[Row] = []
    if config.needs_answers:
        rows = training_rows(job, tokenizer)
        job = with_steps(job, len(rows))
        config = of_kind(DistillConfig, job.config)
    planned = plan_phases(config, ours, theirs, _ranking(source))
    _warn_of_stages_without_steps(config)
    held_out, probes = held_out_rows(job, tokenizer), watched_probes(config, tokenizer)
    prompts = drawn_prompts(job, config, tokenizer, planned)
    models = _models(job, config, planned, needs_teacher=bool(held_out or probes))
    console.log(f"{len(ours.replaced_layers)} mixers follow {models.name}")
    phases = [_phase(job, config, models, theirs, plan, rows, prompts) for plan in planned]
    evaluation = _evaluation(job, config, models, held_out, probes)
    with folder.open(resume, force):
        trim = not (models.compiled or config.capture)
        reports, best = train(models.student, phases, rows, config, folder, evaluation, trim)
        metrics = report_phases(reports, folder)
        if best is not None:
            console.log(f"kept: step {best['step']} of {best['phase']}{shown(best)}")
            metrics["best"] = best
        draw_ledger(folder, asked=bool(held_out))
        release_blocks(models.student)
        save_result(whole, models.student, folder, models.name, metrics, models.rounded)
    return StageResult(str(out), metrics)


def _evaluation(
    job: Job,
    config: DistillConfig,
    models: "_Models",
    held_out: Sequence[Row],
    probes: Sequence[RecallProbe],
) -> Evaluation | None:
    """Measurements during training, None without any."""
    pair, measured = (models.student, models.teacher), []
    if held_out:
        measured.append(HeldOut(*pair, held_out, config.batch_size, job.amp, not models.compiled))
    if probes:
        measured.append(
            WatchedRecall(models.student, present(models.teacher), probes, job.amp, models.compiled)
        )
    if not measured:
        return None

    def measure() -> JsonObject:
        return {name: value for each in measured for name, value in each.measure().items()}

    return Evaluation(config.eval_every, measure)


def plan(config: DistillConfig, source: str) -> JsonObject:
    """Resolve everything, measure how fast this machine is, and say what would run."""
    job = Job.of(STAGE, config, source)
    _check_capture(job, config)
    found = plan_training(job)
    if config.eval_recall:
        watched_probes(config, job.tokenizer())
    ours, theirs = _configs(job)
    job = _counted(job)
    config = of_kind(DistillConfig, job.config)
    planned = plan_phases(config, ours, theirs, _ranking(source))
    _warn_of_stages_without_steps(config)
    predicted = estimate(job, ours, theirs, planned)
    model = shapes_of(ours)
    per_step = job.global_batch * config.max_length
    phases = [
        plan.describe(model, per_step)
        | (_writing(config) if plan.kind == ON_POLICY else {})
        | {"predicted": predicted[plan.name].as_metrics()}
        for plan in planned
    ]
    return found | {"phases": phases, "predicted": Estimate.of_all(predicted)}


def _warn_of_stages_without_steps(config: DistillConfig) -> None:
    for name in without_steps(config):
        console.warn(
            f"{name} is left out: {config.max_steps} steps are too few for "
            f"{', '.join(config.stages)}; raise --max-steps, or name its steps"
        )


def _writing(config: DistillConfig) -> dict[str, int | str]:
    """Describe for `--dry-run` what the student writes of a batch."""
    return {
        "rows_written": config.rows_written(config.batch_size),
        "rows_of_data": config.batch_size - config.rows_written(config.batch_size),
        "new_tokens_at_most": config.onpolicy_tokens,
        "divergence": config.onpolicy_divergence,
    }


def _counted(job: Job) -> Job:
    """The run with its steps, for which epochs need the rows; UsageError for a set on the hub."""
    if job.config.epochs is None:
        return job
    if any(is_on_hub(spec) for spec in names(job.config.data)):
        raise UsageError(
            "--epochs of a set on the hub are known when it is read, which --dry-run does not",
            "give --max-steps",
        )
    return with_steps(job, len(training_rows(job, job.tokenizer())))


def _check_capture(job: Job, config: DistillConfig) -> None:
    """Raise UsageError for steps that no CUDA graph can hold; say so where there are no graphs."""
    config.require_coherent()
    if config.capture and job.device.type != "cuda":
        console.log(f"--capture changes nothing on {job.device}: it has no CUDA graphs")


def _configs(job: Job) -> tuple[HybridConfig, HybridConfig]:
    """The student's and the teacher's configuration; UsageError when nothing was replaced."""
    ours = model_config(job.source)
    if not ours.replaced_layers:
        raise UsageError(
            f"{job.source} has no Mamba layer to distill", f"first: mambactl convert {job.source}"
        )
    return ours, model_config(job.teacher_spec)


def _ranking(source: str) -> list[int] | None:
    """Layers from easy to hard to replace, as the newest selection in the lineage found them."""
    newest = load_lineage(source)
    if newest is None:
        return None
    for link in (newest, *reversed(newest.get("ancestors", []))):
        found = link.get("metrics", {}).get("selection", {}).get("ranking")
        if found:
            return list(found)
    return None


@dataclass
class _Models:
    """Student and teacher; `teacher` is None where a cache replaces it, `name` is its name.

    `rounded` names frozen parameters that are held in less precision than they are stored in.
    """

    student: HybridForCausalLM
    teacher: HybridForCausalLM | None
    name: str
    compiled: bool
    rounded: list[str]


def _models(
    job: Job, config: DistillConfig, planned: Sequence[PhasePlan], needs_teacher: bool
) -> _Models:
    """Load both models; what no phase trains exists once, in the type products take.

    Models that are split come from the CPU, block by block, and each has all of its own weights.
    """
    loading = replace(job, device=torch.device("cpu")) if sharded() else job
    student = loading.student(None)
    cached = config.teacher_cache and all(plan.kind == "logits" for plan in planned)
    if cached and not needs_teacher:
        teacher, name = (
            None,
            read_record(Path(present(config.teacher_cache)).expanduser())["teacher"],
        )
    else:
        teacher, name = loading.teacher(), job.teacher_spec
    trained = {
        key for plan in planned for members, _ in plan.parameters(student) for key in members
    }
    if sharded():
        waiting = {index for plan in planned for index in plan.waiting}
        rounded = split_pair(student, teacher, trained, job.dtype, job.device, waiting)
    else:
        rounded = share_frozen(student, teacher, trained, job.dtype).rounded
    compiling = compiles(config.compile, job.device)
    if compiling:
        for model in (student, teacher):
            if model is not None:
                compile_blocks(model)
    return _Models(student, teacher, name, compiling, rounded)


def _phase(
    job: Job,
    config: DistillConfig,
    models: _Models,
    theirs: HybridConfig,
    plan: PhasePlan,
    rows: Sequence[Row],
    prompts: DrawnPrompts | None,
) -> Phase:
    student, teacher = models.student, models.teacher
    parts = plan.parameters(student)

    # rows of a phase have one shape, or few
    @cache
    def flops(rows: int, length: int, window: int | None) -> float:
        ours = with_window(student.config, window)
        return plan.work(ours, theirs, config.grad_checkpointing).flops(rows, length)

    windows = None
    if config.random_window:
        windows = DrawnWindows(student, config.random_window, config.seed)
    feed = None
    if plan.kind == ON_POLICY and prompts is not None:
        trained = {name for members, _ in parts for name in members}
        trim = not (models.compiled or config.capture)
        feed = StudentRows(config, job.dtype, student, trained, prompts, rows, trim)
    return Phase(
        plan.name,
        plan.steps,
        _objective(job, config, models, plan, rows),
        parts,
        context=StandIns(student, present(teacher), plan.waiting)
        if plan.waiting
        else nullcontext(),
        flops=flops,
        windows=windows,
        cure="lower --align-lr" if plan.kind == "align" else "lower --lr",
        whole=not plan.waiting,
        feed=feed,
    )


def _objective(
    job: Job, config: DistillConfig, models: _Models, plan: PhasePlan, rows: Sequence[Row]
) -> AnyObjective:
    """Objective of a phase; each kind of phase has its own."""
    if plan.kind == "align":
        return AlignmentObjective(models.student, present(models.teacher), job.amp, models.compiled)
    if plan.kind == "logits" and config.teacher_cache:
        return cached_objective(job, config, models.student, rows)
    own = plan.kind == ON_POLICY
    return LogitsObjective(
        models.student,
        models.teacher,
        # to predict what it wrote itself teaches a student nothing
        *((1.0, 0.0) if own else (config.kl_weight, config.ce_weight)),
        config.temperature,
        amp=job.amp,
        divergence=config.onpolicy_divergence if own else config.divergence,
        beta=config.jsd_beta,
    )
