"""Everything a training run leaves behind: its working folder, the result, curves and a plot."""

import hashlib
import json
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from datetime import date
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from mambactl import console
from mambactl.checkpoint.contents import describe
from mambactl.checkpoint.load import adapt, load_lineage, open_checkpoint
from mambactl.checkpoint.ownership import require_apart
from mambactl.checkpoint.provenance import header_digest, lineage
from mambactl.checkpoint.resolve import resolve
from mambactl.checkpoint.run_folder import DAY, OtherFolder, RunFolder, begun_on
from mambactl.checkpoint.safetensors_reader import read_lineage
from mambactl.checkpoint.save import write_model
from mambactl.data.mixture import names, shares
from mambactl.data.row_files import files_of, is_on_hub
from mambactl.errors import ResourceError, UsageError
from mambactl.files import canonical, replacing
from mambactl.foreign import open_regular
from mambactl.json_values import AnyObject, JsonObject
from mambactl.models.hybrid import HybridForCausalLM
from mambactl.options import SpreadConfig, StepsConfig
from mambactl.present import of_kind
from mambactl.ranks import is_main, sharded
from mambactl.report.plots import draw
from mambactl.train.consolidate import consolidated
from mambactl.train.job import Job
from mambactl.train.ledger import PhaseReport
from mambactl.train.run_lines import follow_steps
from mambactl.train.sharing import put_back

Config = TypeVar("Config", bound=StepsConfig)


def working_folder(job: Job, out: Path | None, resume: bool, force: bool) -> RunFolder:
    """The working folder of a run; raises OutputError where it may not be used."""
    if out is None:
        raise UsageError(f"{job.stage} needs a place for its result", "give -o OUT")
    if not is_main():
        return OtherFolder(Path(out), {})
    require_apart(Path(out), _teacher_of_lineage(job))
    before = RunFolder(Path(out), {}).read_mark() if resume else None
    folder = RunFolder(Path(out), identity(job) | _as_shared(job, before or {}))
    follow_steps(of_kind(StepsConfig, job.config), folder)
    folder.check(resume, force)
    return folder


def as_begun(config: Config, out: Path | None, resume: bool) -> Config:
    """The options with which a run that stopped at `out` goes on; see `StageConfig.as_begun`."""
    record = RunFolder(Path(out), {}).read_mark() if resume and out is not None else None
    return config if record is None else regrouped(config.as_begun(record), record)


def regrouped(config: Config, record: AnyObject) -> Config:
    """The options with the rows a step of a run that `record` describes, on other processes.

    Where their number changed, batches per step do, too. Raises UsageError where they cannot.
    """
    begun = _sharing(record)
    if not isinstance(config, SpreadConfig) or begun is None:
        return config
    batches, before = begun
    if config.processes == before or config.grad_accum * config.processes == batches * before:
        return config
    if config.grad_accum != batches or batches * before % config.processes:
        raise UsageError(
            f"{before} {'process' if before == 1 else 'processes'} with --grad-accum {batches} "
            f"began the run, of whose {batches * before} batches a step {config.processes} "
            "processes cannot take equal shares",
            f"resume with --nproc {before}, or another divisor of {batches * before}",
        )
    console.log(
        f"--grad-accum is {batches * before // config.processes} now: "
        f"a step keeps the rows that {before} processes took"
    )
    return config.model_copy(update={"grad_accum": batches * before // config.processes})


def _sharing(record: AnyObject) -> tuple[int, int] | None:
    """Batches per step and process, and processes, of a run; None for a record that has none."""
    batches, count = record.get("grad_accum"), record.get("nproc", 0) or 1
    return (batches, count) if isinstance(batches, int) and isinstance(count, int) else None


def _as_shared(job: Job, record: AnyObject) -> JsonObject:
    """Return how processes first shared the rows of a step, where a run keeps their number."""
    begun, config = _sharing(record), job.config
    if not isinstance(config, SpreadConfig) or begun is None:
        return {}
    if config.grad_accum * config.processes != begun[0] * begun[1]:
        return {}
    return {name: record.get(name) for name in ("grad_accum", "nproc")}


def dated(job: Job, out: Path | None, resume: bool) -> Job:
    """The run on its day: that of the teacher cache it reads, or that on which it began."""
    cache = getattr(job.config, "teacher_cache", None)
    if cache and (folder := Path(cache).expanduser()).is_dir():
        kept = ((read_lineage(folder) or {}).get("cache") or {}).get(DAY)
        # a cache of an earlier version kept no day
        with suppress(TypeError, ValueError):
            return replace(job, day=date.fromisoformat(of_kind(str, kept)))
    return replace(job, day=date.today() if out is None else begun_on(Path(out), resume))


def _teacher_of_lineage(job: Job) -> list[tuple[str, str]]:
    """The teacher that the run takes where no other is given; options name theirs."""
    origin = load_lineage(job.source) or {}
    found = origin.get("teacher") or origin.get("source")
    asked = job.config.teacher
    return [("the teacher", found)] if isinstance(found, str) and not asked else []


def identity(job: Job) -> JsonObject:
    """Everything that a resumed run has to repeat: options, and digests of the files they name."""
    given = job.config.teacher
    return {
        "stage": job.stage,
        **job.config.model_dump(
            mode="json", exclude={*job.config.placement_options, *job.config.since_later}
        ),
        "source": canonical(job.source),
        "source_sha256": header_digest(resolve(job.source).path),
        "teacher": given and canonical(given),
        "teacher_sha256": given and header_digest(resolve(given).path),
        "data": [canonical(spec) for spec in names(job.config.data)],
        "data_sha256": [_file_digest(spec) for spec in names(job.config.data)],
        "data_shares": shares(job.config.data),
        **_held_out_identity(job),
        **({DAY: job.day.isoformat()} if job.day else {}),
        # a trainer's state that is split cannot be read whole, nor the other way round
        **({"sharded": True} if sharded() and not _keeps_whole_state(job) else {}),
    }


def save_result(
    job: Job,
    model: HybridForCausalLM,
    folder: RunFolder,
    teacher: str | None,
    metrics: AnyObject,
    rounded: Collection[str] = (),
) -> None:
    """Write the result in the source's type and let it appear under its name.

    Parameters in `rounded` are written as the source has them. Every process must call it; the main
    one writes.
    """
    whole = consolidated(model)
    if whole is None:
        return
    if rounded:
        put_back(whole, rounded, job.source)
    stored = getattr(torch, describe(job.source)["dtype"])
    with open_checkpoint(job.source) as reader:
        record = lineage(
            job.stage,
            reader.lineage,
            reader.path,
            teacher,
            job.config.model_dump(mode="json"),
            job.config.seed,
            metrics,
        )
        # trainers write special tokens and switches into the configuration of the model
        whole.config = adapt(reader).config
        whole.config.dtype = stored
        write_model(whole.to(stored), folder.result, folder.single, reader.files, record)
    folder.finish()
    folder.publish()


def report_phases(reports: Sequence[PhaseReport], folder: RunFolder) -> JsonObject:
    """Show how every phase went as a table; returns the same as metrics.

    Warns of a phase whose losses, in the folder's metrics, are higher at its end.
    """
    columns = ["phase", "steps", "first loss", "last loss", "tokens", "seconds"]
    rows = [
        [
            r.name,
            r.steps,
            f"{r.first_loss:.4f}",
            f"{r.last_loss:.4f}",
            f"{r.tokens:,}",
            f"{r.seconds:.1f}",
        ]
        for r in reports
    ]
    if any(r.kl is not None for r in reports):
        columns.append("held-out KL")
        for r, row in zip(reports, rows, strict=True):
            row.append("" if r.kl is None else f"{r.kl:.4f}")
    console.table("training", columns, rows)
    lines = folder.read_log() if is_main() else []
    for report in reports:
        losses = [x["loss"] for x in lines if x["phase"] == report.name and "loss" in x]
        # single batches vary too much, those of preferences above all
        few = max(5, len(losses) // 10)
        if len(losses) < 2 * few:
            continue
        first, last = np.mean(losses[:few]), np.mean(losses[-few:])
        if last > first:
            flag = "--align-lr" if report.name == "align" else "--lr"
            console.warn(
                f"the last {few} losses of {report.name} are {last:.4f} on average, the first "
                f"{few} were {first:.4f}: lower {flag}"
            )
    return {
        r.name: {k: v for k, v in asdict(r).items() if k != "name" and v is not None}
        for r in reports
    }


def draw_ledger(folder: RunFolder, asked: bool) -> None:
    """Plot the run beside its metrics; reports a missing library if the plot was `asked` for."""
    if not is_main():
        return
    with console.failure_warned(folder.plot):
        try:
            with replacing(folder.plot) as new:
                draw({folder.out.name: folder.metrics}, new)
        except (ResourceError, UsageError) as error:
            if asked:
                console.log(f"no plot: {error} ({error.hint})")


def _keeps_whole_state(job: Job) -> bool:
    return isinstance(job.config, SpreadConfig) and job.config.whole_state


def _held_out_identity(job: Job) -> JsonObject:
    specs = getattr(job.config, "eval_data", None)
    if specs is None:
        return {}
    cache = getattr(job.config, "teacher_cache", None)
    return {
        "teacher_cache_sha256": cache and header_digest(Path(cache).expanduser()),
        "eval_data": [canonical(spec) for spec in specs],
        "eval_data_sha256": [_file_digest(spec) for spec in specs],
    }


def _file_digest(spec: str) -> str | None:
    """sha256 of a file; None for a set on the hub and for what reading the data will refuse.

    Of several files, those of a pattern or a folder, it is the sha256 of their names and their own.
    """
    if is_on_hub(spec):
        return None
    files = files_of(spec)
    try:
        digests = [_content_digest(file) for file in files]
    except UsageError:
        return None
    if files == [spec]:
        return digests[0]
    return hashlib.sha256(json.dumps([files, digests]).encode()).hexdigest()


def _content_digest(file: str) -> str:
    with open_regular(Path(file), UsageError) as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
