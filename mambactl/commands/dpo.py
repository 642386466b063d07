"""`dpo`: direct preference optimisation against the teacher, or against the model's own start."""

import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from mambactl import console
from mambactl.checkpoint.load import load_model
from mambactl.checkpoint.run_folder import RunFolder
from mambactl.checkpoint.vocabulary import token_id
from mambactl.evaluation.rewards import Layout
from mambactl.files import replacing
from mambactl.json_values import JsonObject
from mambactl.models.hybrid import HybridForCausalLM
from mambactl.options import DpoConfig
from mambactl.present import of_kind
from mambactl.ranks import from_main, is_main, join, largest, sharded
from mambactl.stage_result import StageResult
from mambactl.train.epochs import with_steps
from mambactl.train.job import Job
from mambactl.train.preference_data import Preferences, preview, read_preferences
from mambactl.train.preview import plan_training
from mambactl.train.publish import as_begun, dated, report_phases, save_result, working_folder
from mambactl.train.reference_policy import HeldOutPreferences, precomputed, show_held_out
from mambactl.train.trainer import follow, require_trackers, trainer_arguments

if TYPE_CHECKING:
    from mambactl.train.preference import PreferenceTrainer

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
    config = as_begun(config, out, resume)
    _require(config)
    job = Job.of(STAGE, config, source)
    whole = job = dated(job, out, resume)
    folder = working_folder(job, out, resume, force)
    join(job.device)
    data = read_preferences(job, config)
    job = with_steps(job, data.available, "pairs")
    config = of_kind(DpoConfig, job.config)
    student = job.student()
    reference = _reference(job, config)
    with folder.open(resume, force):
        # the main process is in its folder: nothing of a run before is left there
        from_main(None)
        held, before = _held_out(job, config, folder, student, reference, data)
        trainer = _trainer(job, config, folder, student, reference, data, held)
        # runs of versions that kept no day
        trainer.older = job.day is None
        del reference
        metrics: JsonObject = report_phases([follow(trainer, STAGE, folder)], folder)
        metrics |= {"data": data.counts}
        if config.max_kl is not None and held.farthest() > config.max_kl:
            console.warn(f"the policy is {held.farthest():.4f} nats per token from its reference")
        if held.sets:
            after = held.last or held.measure()
            show_held_out(before, after)
            metrics["held_out"] = {
                name: found | {"before": before[name]} for name, found in after.items()
            }
        spec = job.teacher_spec if config.reference == "teacher" else None
        save_result(whole, student, folder, spec, metrics)
    return StageResult(str(out), metrics)


def plan(config: DpoConfig, source: str) -> JsonObject:
    """Resolve everything, check the data and show a pair; writes nothing."""
    _require(config)
    job = Job.of(STAGE, config, source)
    found = plan_training(job, config.reference == "teacher", foreign=True, counts=False)
    shown = {"reference": config.reference, "losses": dict(_losses(config))}
    return found | shown | preview(job, config)


def _require(config: DpoConfig) -> None:
    """Raise for what cannot be trained, before anything is loaded."""
    config.require_coherent()
    if sharded():
        config.require_splittable()
    require_trackers(config)


def _losses(config: DpoConfig) -> list[tuple[str, float]]:
    """Every loss with its weight."""
    weights = config.loss_weights or [1.0] * len(config.loss_type)
    losses = list(zip(config.loss_type, weights, strict=True))
    return losses + ([("sft", config.sft_weight)] if config.sft_weight else [])


def _reference(job: Job, config: DpoConfig) -> HybridForCausalLM:
    if config.reference == "teacher":
        model = job.teacher(foreign=True)
    else:
        # a copy of its own: after a resume the student is no longer what it started as
        model = load_model(job.source, job.device, job.dtype).requires_grad_(False)
    # rounded like the policy, whose weights are fp32, where it does not stay in memory
    return model.float() if _precomputes(config) else model


def _precomputes(config: DpoConfig) -> bool:
    """True if the reference is computed ahead; TRL would load one of its own under FSDP."""
    return config.precompute_reference and not sharded()


def _layout(job: Job, reference: HybridForCausalLM) -> Layout:
    """Packed rows need both models to reset their state between documents."""
    config = job.config
    packing = config.packing and isinstance(reference, HybridForCausalLM)
    return Layout(config.max_length, config.batch_size, packing, job.amp)


def _held_out(
    job: Job,
    config: DpoConfig,
    folder: RunFolder,
    student: HybridForCausalLM,
    reference: HybridForCausalLM,
    data: Preferences,
) -> tuple[HeldOutPreferences, dict[str, JsonObject]]:
    """The measurement of this run, and what it gave before the first step."""
    held = HeldOutPreferences(
        student,
        reference,
        data.held,
        _layout(job, reference),
        config.beta,
        config.eval_every,
        config.max_steps,
    )
    kept = folder.path / "before.json"
    if kept.exists():
        return held, json.loads(kept.read_text("utf-8"))
    before = held.measure()
    held.last = {}
    if not is_main():
        return held, before
    with replacing(kept) as new:
        new.write_text(json.dumps(before), "utf-8")
    return held, before


def _any(found: bool, job: Job) -> bool:
    """True if any process found it: last bits may differ between them, but all must stop."""
    return bool(largest(int(found), job.device))


def _trainer(
    job: Job,
    config: DpoConfig,
    folder: RunFolder,
    student: HybridForCausalLM,
    reference: HybridForCausalLM,
    data: Preferences,
    held: HeldOutPreferences,
) -> "PreferenceTrainer":
    from datasets import disable_progress_bars
    from trl.trainer.dpo_config import DPOConfig

    from mambactl.train.preference import PairCollator, PreferenceTrainer, preference_dataset

    disable_progress_bars()
    tokenizer, layout = job.tokenizer(), _layout(job, reference)
    logps = None
    if _precomputes(config):
        logps = precomputed(folder, reference, data.train, layout)
    names, weights = zip(*_losses(config), strict=True)
    # transformers has a new name for an option that TRL sets by its old one
    warnings.filterwarnings("ignore", "`gradient_checkpointing` is deprecated", FutureWarning)
    usual = trainer_arguments(config, folder, config.lr, job.device, job.amp)
    usual["include_num_input_tokens_seen"] = "non_padding"
    arguments = DPOConfig(
        **usual,
        beta=config.beta,
        loss_type=list(names),
        loss_weights=list(weights),
        label_smoothing=config.label_smoothing,
        ld_alpha=config.ld_alpha,
        f_divergence_type=config.f_divergence,
        precompute_ref_log_probs=_precomputes(config),
    )
    pad = token_id(tokenizer.pad_token_id)
    pad = token_id(tokenizer.eos_token_id) if pad is None else pad
    return PreferenceTrainer(
        student,
        None if _precomputes(config) else reference,
        arguments,
        measure=held.at,
        enough=lambda _: config.max_kl is not None and _any(held.farthest() > config.max_kl, job),
        data_collator=PairCollator(pad or 0, layout.width, layout.packing),
        train_dataset=preference_dataset(data.train, logps, config.ld_alpha),
        processing_class=tokenizer,
    )
