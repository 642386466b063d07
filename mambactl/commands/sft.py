"""`sft`: supervised fine-tuning on text or chats, with the teacher's words weighed in if asked."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from mambactl import console
from mambactl.checkpoint.run_folder import RunFolder
from mambactl.checkpoint.vocabulary import model_config
from mambactl.commands.teacher_cache import open_cache, read_record
from mambactl.data.pack import Row
from mambactl.errors import UsageError
from mambactl.json_values import JsonObject
from mambactl.models.hybrid import HybridForCausalLM
from mambactl.options import SftConfig
from mambactl.present import of_kind, present
from mambactl.ranks import processes, sharded
from mambactl.stage_result import StageResult
from mambactl.train.compiled import compile_blocks, release_blocks
from mambactl.train.epochs import with_steps
from mambactl.train.held_out import HeldOut
from mambactl.train.job import Job
from mambactl.train.ledger import Evaluation
from mambactl.train.lora import adapted, merged, projections, require_peft, unadapted
from mambactl.train.phases import shapes_of
from mambactl.train.preview import TRAINED_BYTES, plan_training, preview
from mambactl.train.publish import (
    as_begun,
    dated,
    draw_ledger,
    report_phases,
    save_result,
    working_folder,
)
from mambactl.train.rows import held_out_rows, training_rows
from mambactl.train.sharing import put_back
from mambactl.train.trainer import follow, require_trackers, trainer_arguments

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from mambactl.train.matching import MatchingTrainer

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
    config = as_begun(config, out, resume)
    job = Job.of(STAGE, config, source)
    _require(config)
    whole = job = dated(job, out, resume)
    folder = working_folder(job, out, resume, force)
    tokenizer = job.tokenizer()
    rows = training_rows(job, tokenizer, config.assistant_only_loss)
    job = with_steps(job, len(rows))
    config = of_kind(SftConfig, job.config)
    held_out = held_out_rows(job, tokenizer, config.assistant_only_loss)
    # frozen weights need no fp32 masters
    student = job.student(torch.float32 if config.lora is None else job.dtype)
    teacher = _teacher(job, config, measures=bool(held_out))
    if config.compile:
        for model in filter(None, (student, teacher)):
            compile_blocks(model)
    with folder.open(resume, force):
        trainer = _trainer(job, config, folder, student, teacher, rows, tokenizer)
        # runs of versions that kept no day
        trainer.older = job.day is None
        evaluation = None
        if held_out:
            trim = not config.compile
            measured = HeldOut(student, teacher, held_out, config.batch_size, job.amp, trim)
            evaluation = Evaluation(config.eval_every, measured.measure)
        metrics = report_phases([follow(trainer, STAGE, folder, evaluation)], folder)
        draw_ledger(folder, asked=bool(held_out) and teacher is not None)
        release_blocks(student)
        named = _teacher_name(job, config, teacher)
        result = merged(of_kind(nn.Module, trainer.model))
        if config.lora is not None:
            # what has no adapter was held in the type of products
            put_back(result, unadapted(result, config.freeze_kept), job.source)
        save_result(whole, result, folder, named, metrics)
    return StageResult(str(out), metrics)


def plan(config: SftConfig, source: str) -> JsonObject:
    """Resolve everything, read the data and say what would run; writes nothing."""
    _require(config)
    job = Job.of(STAGE, config, source)
    if config.teacher_cache:
        read_record(Path(present(config.teacher_cache)).expanduser())
    needs_teacher = config.kl_weight > 0 and not config.teacher_cache
    found = plan_training(job, with_teacher=needs_teacher, counts=False)
    if config.lora is not None:
        found |= _adapter_plan(job, config, found["estimated_bytes"], found["parameters"])
    return found | preview(job, config.assistant_only_loss)


def _adapter_plan(job: Job, config: SftConfig, estimated: int, parameters: int) -> JsonObject:
    """Parameters that train, and bytes where everything else is frozen."""
    model = shapes_of(model_config(job.source))
    linears = (
        of_kind(nn.Linear, model.get_submodule(name))
        for name in projections(model, config.freeze_kept)
    )
    rank = present(config.lora)
    count = rank * sum(each.in_features + each.out_features for each in linears)
    frozen = parameters * (TRAINED_BYTES - job.dtype.itemsize)
    return {
        "trained_parameters": count,
        "estimated_bytes": estimated - frozen + count * TRAINED_BYTES,
    }


def _require(config: SftConfig) -> None:
    """Raise for what cannot be trained, before anything is loaded."""
    config.require_coherent()
    if sharded():
        config.require_splittable()
    require_peft(config)
    require_trackers(config)


def _teacher(job: Job, config: SftConfig, measures: bool) -> HybridForCausalLM | None:
    """The model that the KL or a measurement needs; a measurement alone can do without."""
    if config.kl_weight and (measures or not config.teacher_cache):
        return job.teacher()
    if not measures:
        return None
    try:
        return job.teacher()
    except UsageError as error:
        console.log(f"held out: cross entropy only, {error}")
        return None


def _teacher_name(job: Job, config: SftConfig, teacher: HybridForCausalLM | None) -> str | None:
    """Whom the KL followed, for the lineage."""
    if not config.kl_weight:
        return None
    if teacher is not None:
        return job.teacher_spec
    return read_record(Path(present(config.teacher_cache)).expanduser())["teacher"]


def _trainer(
    job: Job,
    config: SftConfig,
    folder: RunFolder,
    student: HybridForCausalLM,
    teacher: HybridForCausalLM | None,
    rows: Sequence[Row],
    tokenizer: "PreTrainedTokenizerBase",
) -> "MatchingTrainer":
    from trl.trainer.sft_config import SFTConfig

    from mambactl.train.matching import MatchingTrainer, as_dataset, cached, collate_features

    # compiled code is made for one shape
    trim = not config.compile
    collator = partial(collate_features, trim=trim)
    if config.teacher_cache:
        collator, teacher = cached(open_cache(job, config, student, rows), trim), None
    shared = trainer_arguments(config, folder, config.lr, job.device, job.amp)
    # rows are packed and masked already, the same way as for distillation
    prepared = {"dataset_kwargs": {"skip_prepare_dataset": True}, "remove_unused_columns": False}
    # a smaller last batch would compile the blocks again; another pass leaves out other rows
    full = len(rows) >= config.batch_size * processes()
    prepared["dataloader_drop_last"] = config.compile and full
    # drawn so that a resumed run starts from the same adapters, though it reads them back
    torch.manual_seed(config.seed)
    return MatchingTrainer(
        adapted(student, config),
        SFTConfig(**shared, **prepared),
        teacher=teacher if config.kl_weight else None,
        kl_weight=config.kl_weight,
        ce_weight=config.ce_weight,
        amp=job.amp,
        data_collator=collator,
        train_dataset=as_dataset(rows),
        processing_class=tokenizer,
    )
