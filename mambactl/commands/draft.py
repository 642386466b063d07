"""`draft`: a head or a small model that drafts for a target, trained on the target's own text."""

from pathlib import Path

import torch

from mambactl import console
from mambactl.checkpoint.contents import describe
from mambactl.checkpoint.load import load_model, open_checkpoint
from mambactl.checkpoint.provenance import lineage
from mambactl.checkpoint.run_folder import RunFolder
from mambactl.checkpoint.save import write_model
from mambactl.checkpoint.vocabulary import model_config
from mambactl.data.mixture import names
from mambactl.data.row_files import is_on_hub
from mambactl.decode.head_files import weights_digest, write_head
from mambactl.errors import UsageError
from mambactl.json_values import JsonObject
from mambactl.models.config import HybridConfig
from mambactl.models.draft_head import DraftHead
from mambactl.models.hybrid import HybridForCausalLM
from mambactl.options import DraftConfig
from mambactl.stage_result import StageResult
from mambactl.train.draft_start import begun_head, cut_model, spread_layers
from mambactl.train.draft_text import DraftText
from mambactl.train.frequent_tokens import CountedRows
from mambactl.train.head_objective import HeadObjective
from mambactl.train.held_out_drafts import HeldOutDrafts, show_drafts
from mambactl.train.job import Job
from mambactl.train.ledger import Evaluation
from mambactl.train.loop import Parameters, Phase, train
from mambactl.train.optimization import LogitsObjective
from mambactl.train.publish import as_begun, dated, draw_ledger, report_phases, working_folder
from mambactl.train.repeated_text import RepeatedText

STAGE = "draft"
Draft = DraftHead | HybridForCausalLM


def run(
    config: DraftConfig,
    source: str,
    out: Path | None,
    *,
    resume: bool = False,
    force: bool = False,
) -> StageResult:
    """Train a draft for the model at `source`, which stays as it is, and write it to `out`."""
    config = as_begun(config, out, resume)
    config.require_coherent()
    job = Job.of(STAGE, config, source)
    _require_fitting(config, model_config(source))
    job = dated(job, out, resume)
    folder = working_folder(job, out, resume, force)
    text = DraftText.of(job, config)
    target = load_model(source, job.device, job.dtype).requires_grad_(False)
    digest = weights_digest(target)
    with folder.open(resume, force):
        feed = text.feed(target)
        draft = _begun(config, target, text, feed, folder)
        objective = _objective(job, config, draft, target)
        steps = text.config.max_steps
        repeated = feed and RepeatedText(feed, config.answer_uses, config.grad_accum)
        phase = Phase(config.kind, steps, objective, _trained(config, draft), feed=repeated)
        held = text.held_out(target)
        measured = HeldOutDrafts(objective, held, config.unroll) if held else None
        evaluation = Evaluation(config.eval_every, measured.measure) if measured else None
        reports, _ = train(draft, [phase], text.rows, text.config, folder, evaluation)
        metrics = report_phases(reports, folder) | _facts(draft, digest)
        if measured is not None:
            metrics["held_out"] = measured.facts()
            show_drafts(metrics["held_out"])
        draw_ledger(folder, asked=False)
        _save(job, draft, folder, config.own_output, metrics)
    if config.kind == "head":
        console.log(f"only mambactl decodes with it, and only {source} as it is now")
    return StageResult(str(out), metrics)


def plan(config: DraftConfig, source: str) -> JsonObject:
    """Describe the draft, its text and its training; reads no weights and writes nothing."""
    config.require_coherent()
    job, ours = Job.of(STAGE, config, source), model_config(source)
    _require_fitting(config, ours)
    found: JsonObject = {
        "source": describe(source)["checkpoint"],
        "kind": config.kind,
        "text": config.text,
        "device": str(job.device),
        "dtype": str(job.dtype).removeprefix("torch."),
        "global_batch": job.global_batch,
        "max_steps": config.max_steps,
        "tokens_at_most": job.budget,
    }
    if not any(is_on_hub(spec) for spec in names([*config.data, *config.eval_data])):
        found |= DraftText.of(job, config).describe()
    if config.kind == "head":
        return found | {"vocabulary": min(config.vocabulary, ours.vocab_size)}
    return found | {"kept_layers": spread_layers(ours.num_hidden_layers, config.layers)}


def _require_fitting(config: DraftConfig, target: HybridConfig) -> None:
    """Raise UsageError for a draft of more layers or tokens than its target has."""
    config.require_vocabulary(target.vocab_size)
    if config.kind == "model" and config.layers >= target.num_hidden_layers:
        raise UsageError(
            f"a draft of {config.layers} layers is no smaller than its target, which has "
            f"{target.num_hidden_layers}",
            "give fewer --layers",
        )


def _begun(
    config: DraftConfig,
    target: HybridForCausalLM,
    text: DraftText,
    feed: CountedRows | None,
    folder: RunFolder,
) -> Draft:
    """The draft before its first step, in training mode."""
    if config.kind == "model":
        layers = spread_layers(target.config.num_hidden_layers, config.layers)
        return cut_model(target, layers)
    ids = text.tokens(feed, target.config.vocab_size, config, folder)
    # a run that goes on has the weights that it reached
    opening = [] if folder.resumable else text.opening(feed, config)
    return begun_head(target, ids, config.own_output, opening)


def _objective(
    job: Job, config: DraftConfig, draft: Draft, target: HybridForCausalLM
) -> HeadObjective | LogitsObjective:
    weights = config.kl_weight, config.ce_weight
    if isinstance(draft, DraftHead):
        return HeadObjective(draft, target, config.unroll, *weights, amp=job.amp)
    return LogitsObjective(draft, target, *weights, amp=job.amp)


def _trained(config: DraftConfig, draft: Draft) -> list[tuple[Parameters, float]]:
    """Parameters that train with their rates: the target's embedding and output rows do not."""
    parts: dict[bool, Parameters] = {False: {}, True: {}}
    for name, parameter in draft.named_parameters():
        output = name.endswith("lm_head.weight")
        if not name.endswith("embed_tokens.weight"):
            parts[output][name] = parameter
    own = [(parts[True], config.output_lr)] if config.own_output and parts[True] else []
    return [(parts[False], config.lr), *own]


def _facts(draft: Draft, digest: str) -> JsonObject:
    """Metrics of a draft itself: its parameters, and the digest of its target's weights."""
    tied = draft.body.model.embed_tokens if isinstance(draft, DraftHead) else None
    shared = 0 if tied is None else tied.weight.numel()
    found: JsonObject = {
        "parameters": sum(p.numel() for p in draft.parameters()) - shared,
        "target_sha256": digest,
    }
    return found | ({"vocabulary": len(draft.ids)} if isinstance(draft, DraftHead) else {})


def _save(job: Job, draft: Draft, folder: RunFolder, own_output: bool, metrics: JsonObject) -> None:
    """Write the draft in its target's type and let it appear under its name."""
    stored = getattr(torch, describe(job.source)["dtype"])
    with open_checkpoint(job.source) as reader:
        record = lineage(
            STAGE,
            reader.lineage,
            reader.path,
            None,
            job.config.model_dump(mode="json"),
            job.config.seed,
            metrics,
        )
        if isinstance(draft, DraftHead):
            target = job.source, metrics["target_sha256"]
            write_head(draft.to(stored), folder.result, folder.single, target, record, own_output)
        else:
            draft.config.dtype = stored
            write_model(draft.to(stored), folder.result, folder.single, reader.files, record)
    folder.finish()
    folder.publish()
