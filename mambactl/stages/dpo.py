"""`dpo`: direct preference optimisation against the teacher, or against the model's own start."""

from pathlib import Path
from typing import Any

import numpy as np

from mambactl import console
from mambactl.checkpoint.load import load_model
from mambactl.data.format import encode_rows
from mambactl.data.load import Document
from mambactl.models.hybrid import HybridForCausalLM
from mambactl.recipe import DpoConfig
from mambactl.stages import StageResult
from mambactl.stages.training import Job, plan_training, report_phases
from mambactl.train.run_folder import RunFolder
from mambactl.train.trainer import follow, trainer_arguments

STAGE = "dpo"


def run(
    config: DpoConfig,
    source: str,
    out: Path | None,
    *,
    resume: bool = False,
    force: bool = False,
) -> StageResult:
    """Tune the model at `source` on preferences and write the result to `out`."""
    job = Job.of(STAGE, config, source)
    folder = job.folder(out, resume, force)
    pairs = _pairs(job)
    student = job.student()
    reference = _reference(job, config)
    with folder.open(resume, force):
        trainer = _trainer(job, config, folder, student, reference, pairs)
        metrics = report_phases([follow(trainer, STAGE, folder)])
        spec = job.teacher_spec() if config.reference == "teacher" else None
        job.save(student, folder, spec, metrics)
    console.log(f"wrote {out}")
    return StageResult(str(out), metrics)


def plan(config: DpoConfig, source: str) -> dict[str, Any]:
    """Resolve everything and say what would run; writes nothing."""
    job = Job.of(STAGE, config, source)
    return plan_training(job, "preference", config.reference == "teacher", foreign=True)


def _pairs(job: Job) -> list[Document]:
    """As many preferences as the run can see, in an order given by the seed."""
    config = job.config
    pairs = job.documents("preference")
    order = np.random.default_rng(config.seed).permutation(len(pairs))
    chosen = [pairs[i] for i in order[: job.examples]]
    # the trainer renders them itself; a template that cannot is better found here, with its row
    whole = [Document(pair.where, {"messages": pair["prompt"] + pair["chosen"]}) for pair in chosen]
    encode_rows(whole, job.tokenizer())
    console.log(f"data: {len(chosen)} of {len(pairs)} preferences")
    return chosen


def _reference(job: Job, config: DpoConfig) -> HybridForCausalLM:
    if config.reference == "teacher":
        return job.teacher(foreign=True)
    # a copy of its own: after a resume the student is no longer what it started as
    return load_model(job.source, job.device, job.dtype).requires_grad_(False)


def _trainer(
    job: Job,
    config: DpoConfig,
    folder: RunFolder,
    student: HybridForCausalLM,
    reference: HybridForCausalLM,
    pairs: list[Document],
) -> Any:
    from datasets import Dataset, disable_progress_bars
    from trl import DPOConfig

    from mambactl.train.preferences import PreferenceTrainer

    disable_progress_bars()
    shared = trainer_arguments(config, folder, config.lr, job.device, job.amp)
    return PreferenceTrainer(
        student,
        reference,
        DPOConfig(**shared, beta=config.beta),
        train_dataset=Dataset.from_list(pairs),
        processing_class=job.tokenizer(),
    )
