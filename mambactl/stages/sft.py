"""`sft`: supervised fine-tuning on text or chats, with the teacher's words weighed in if asked."""

from pathlib import Path
from typing import Any

from mambactl import console
from mambactl.errors import UsageError
from mambactl.models.hybrid import HybridForCausalLM
from mambactl.recipe import SftConfig
from mambactl.stages import StageResult
from mambactl.stages.training import Job, plan_training, report_phases
from mambactl.train.run_folder import RunFolder
from mambactl.train.trainer import follow, trainer_arguments

STAGE = "sft"


def run(
    config: SftConfig,
    source: str,
    out: Path | None,
    *,
    resume: bool = False,
    force: bool = False,
) -> StageResult:
    """Fine-tune the model at `source` and write the result to `out`."""
    job = Job.of(STAGE, config, source)
    folder = job.folder(out, resume, force)
    _require_loss(config)
    student = job.student()
    teacher = job.teacher() if config.kl_weight else None
    with folder.open(resume, force):
        report = follow(_trainer(job, config, folder, student, teacher), STAGE, folder)
        metrics = report_phases([report])
        spec = job.teacher_spec() if teacher is not None else None
        job.save(student, folder, spec, metrics)
    console.log(f"wrote {out}")
    return StageResult(str(out), metrics)


def plan(config: SftConfig, source: str) -> dict[str, Any]:
    """Resolve everything and say what would run; writes nothing."""
    _require_loss(config)
    job = Job.of(STAGE, config, source)
    return plan_training(job, with_teacher=config.kl_weight > 0)


def _trainer(
    job: Job,
    config: SftConfig,
    folder: RunFolder,
    student: HybridForCausalLM,
    teacher: HybridForCausalLM | None,
) -> Any:
    from trl import SFTConfig

    from mambactl.train.matching import MatchingTrainer, as_dataset, collate_features

    tokenizer = job.tokenizer()
    rows = job.rows(tokenizer, config.assistant_only_loss)
    shared = trainer_arguments(config, folder, config.lr, job.device, job.amp)
    # rows are packed and masked already, the same way as for distillation
    prepared = {"dataset_kwargs": {"skip_prepare_dataset": True}, "remove_unused_columns": False}
    return MatchingTrainer(
        student,
        SFTConfig(**shared, **prepared),
        teacher=teacher,
        kl_weight=config.kl_weight,
        ce_weight=config.ce_weight,
        amp=job.amp,
        data_collator=collate_features,
        train_dataset=as_dataset(rows),
        processing_class=tokenizer,
    )


def _require_loss(config: SftConfig) -> None:
    if not config.ce_weight and not config.kl_weight:
        raise UsageError("ce_weight and kl_weight are both 0", "give one of them a weight")
