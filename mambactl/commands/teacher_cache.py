"""`teacher-cache`: draw a few ids per token from the teacher once, so that distilling needs none.

Rows are those that `distill` sees for the same data, length, packing, seed and number of tokens; it
looks them up by what is in them, and says which command makes what it does not find.
"""

import hashlib
import json
import shlex
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, Field

from mambactl import console
from mambactl.checkpoint.contents import describe
from mambactl.checkpoint.load import load_model, open_checkpoint
from mambactl.checkpoint.provenance import header_digest, lineage
from mambactl.checkpoint.resolve import resolve
from mambactl.checkpoint.run_folder import DAY, RunFolder
from mambactl.checkpoint.safetensors_reader import read_lineage
from mambactl.data.mixture import names
from mambactl.data.pack import Row, collate
from mambactl.data.sources import count_rows
from mambactl.errors import ModelError, OutputError, UsageError
from mambactl.files import LINEAGE, explained, gib, replacing
from mambactl.foreign import fitted
from mambactl.generation.dealing import Deal
from mambactl.json_values import JsonObject
from mambactl.models.device_map import Rooms
from mambactl.models.hybrid import HybridForCausalLM
from mambactl.options import DistillConfig, HeldOutConfig, TeacherCacheConfig
from mambactl.present import present
from mambactl.ranks import is_main
from mambactl.stage_result import StageResult
from mambactl.train.cached_teacher import (
    PATTERN,
    CachedObjective,
    Drawing,
    TeacherCache,
    digests,
    draw_batch,
    write_shard,
)
from mambactl.train.job import Job
from mambactl.train.publish import dated, identity
from mambactl.train.rows import training_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

STAGE = "teacher-cache"
# what a kill loses at most: a minute of an 8B teacher on one GPU
SHARD_TOKENS = 1 << 20
_FREE = "free some disk space, then use --resume"
# what has to be equal for rows to be equal, where not all of the data fits
ROW_OPTIONS = (
    *("max_steps", "epochs", "batch_size", "grad_accum", "append_eos"),
    *("max_length", "max_samples", "recall_share", "seed"),
    *("packing", "skip_bad_rows", "assistant_only_loss"),
)


def run(
    config: TeacherCacheConfig,
    source: str,
    out: Path | None,
    *,
    resume: bool = False,
    force: bool = False,
) -> StageResult:
    """Draw from the model at `source` for every row of the data, and write the folder `out`."""
    config.require_coherent()
    deal = Deal()
    job = dated(Job.of(STAGE, config, source), out, resume)
    job = replace(job, day=deal.day(job.day))
    folder = _folder(job, out, resume, force)
    tokenizer = job.tokenizer()
    rows = _distinct(training_rows(job, tokenizer, config.assistant_only_loss))
    teacher = load_model(source, job.device, job.dtype, rooms=Rooms.of(config))
    teacher.requires_grad_(False)
    started = time.perf_counter()
    if not is_main():
        with explained(folder.path, _FREE):
            _fill(job, config, folder, deal, teacher, rows)
        return StageResult(str(out), {})
    with folder.open(resume, force):
        with explained(folder.path, _FREE):
            folder.result.mkdir(exist_ok=True)
            _fill(job, config, folder, deal, teacher, rows)
            tokens = sum(int(row.loss_mask.sum()) for _, row in rows)
            size = sum(file.stat().st_size for file in folder.result.glob(PATTERN))
            metrics = {
                "rows": len(rows),
                "tokens": tokens,
                "bytes": size,
                "seconds": time.perf_counter() - started,
            }
            record = _record(job, config, metrics, teacher, tokenizer)
            with replacing(folder.result / LINEAGE) as new:
                new.write_text(json.dumps(record, indent=2) + "\n", "utf-8")
            folder.finish()
        folder.publish()
    console.log(f"{tokens:,} tokens, {gib(size)}")
    return StageResult(str(out), metrics)


def plan(config: TeacherCacheConfig, source: str) -> JsonObject:
    """Resolve everything and say what would be drawn; writes nothing, reads no hub set."""
    job = Job.of(STAGE, config, source)
    found = describe(source)
    return {
        "source": found["checkpoint"],
        "parameters": found["parameters"],
        "samples": config.samples,
        "documents": count_rows(names(config.data), config.max_samples),
        "tokens_at_most": job.budget,
        "recall_tokens_at_most": job.recall_budget,
        "device": str(job.device),
        "dtype": str(job.dtype).removeprefix("torch."),
    }


def cached_objective(
    job: Job, config: DistillConfig, student: HybridForCausalLM, rows: Sequence[Row]
) -> CachedObjective:
    """The logits objective of `distill --teacher-cache`; raises UsageError as `open_cache` does."""
    if config.divergence != "forward":
        raise UsageError(
            f"a teacher cache estimates the forward KL, not {config.divergence}",
            "drop --teacher-cache or --divergence",
        )
    cache = open_cache(job, config, student, rows, config.temperature)
    weights = (config.kl_weight, config.ce_weight, config.temperature)
    return CachedObjective(student, cache, *weights, amp=job.amp)


def open_cache(
    job: Job,
    config: HeldOutConfig,
    student: HybridForCausalLM,
    rows: Sequence[Row],
    temperature: float = 1.0,
) -> TeacherCache:
    """Open the cache of `--teacher-cache`, which must hold every row of the run.

    Raises UsageError for a cache of another vocabulary, temperature, teacher or other rows.
    """
    folder = Path(present(config.teacher_cache)).expanduser()
    kept = read_record(folder)
    _require_same(job, config, student, folder, kept, temperature)
    cache = TeacherCache(folder, kept["vocab_size"])
    missing = sum(key not in cache for row in rows for key in digests(row))
    if missing:
        raise UsageError(
            f"{missing} of {len(rows)} rows are not in {folder}",
            _command(job, config, kept, temperature),
        )
    console.log(f"{len(cache)} rows of {kept['teacher']} from {folder}, no teacher in memory")
    return cache


class _Kept(BaseModel):
    """Record of a cache that a run compares with its own."""

    teacher: str
    teacher_sha256: str | None
    vocab_size: int = Field(gt=0)
    tokenizer_sha256: str
    temperature: float


class _Record(BaseModel):
    cache: _Kept


def read_record(folder: Path) -> JsonObject:
    """Read the origin of a cache; raises ModelError for a folder that is none."""
    record = read_lineage(folder) if folder.is_dir() else None
    if record is None or record.get("stage") != STAGE:
        hint = f"mambactl {STAGE} TEACHER --data DATA -o {folder}"
        raise ModelError(f"{folder} is no teacher cache", hint)
    fitted(_Record, record, folder / LINEAGE, "", ModelError, "make the cache again")
    return record["cache"]


class _State(BaseModel):
    shards: int = Field(default=0, ge=0)


def _fill(
    job: Job,
    config: TeacherCacheConfig,
    folder: RunFolder,
    deal: Deal,
    teacher: HybridForCausalLM,
    rows: Sequence[tuple[bytes, Row]],
) -> None:
    """Write every shard that is not done yet, as one of the processes of the run."""
    per_shard = max(1, SHARD_TOKENS // config.max_length)
    shards = -(-len(rows) // per_shard)
    drawing = Drawing(config.samples, config.temperature, config.power, config.seed)
    digest = hashlib.sha256(b"".join(key for key, _ in rows)).hexdigest()
    left = deal.left(digest, _missing(folder, shards) if is_main() else [])
    sizes = [len(rows[number * per_shard : (number + 1) * per_shard]) for number in left]
    with console.progress("rows", len(rows)) as bar:
        bar.advance(len(rows) - sum(sizes))
        for number in deal.numbers(left):
            members = rows[number * per_shard : (number + 1) * per_shard]
            drawn = []
            for start in range(0, len(members), config.batch_size):
                keys, some = zip(*members[start : start + config.batch_size], strict=True)
                batch = collate(some).to(job.device)
                drawn += draw_batch(teacher, batch, keys, drawing, job.amp)
                bar.advance(deal.done(len(some)))
            keys = [key for key, _ in members]
            path = _shard(folder, number)
            write_shard(path, keys, drawn, teacher.config.vocab_size, config.power != 1)
            _save_state(folder, shards)
        deal.leave()
        for _ in deal.others():
            bar.advance(deal.done())
    if is_main() and (lost := _missing(folder, shards)):
        raise OutputError(f"{_shard(folder, lost[0])} is gone", "--resume draws it again")


def _shard(folder: RunFolder, number: int) -> Path:
    return folder.result / f"samples-{number:05d}.safetensors"


def _missing(folder: RunFolder, shards: int) -> list[int]:
    """Numbers of the shards that are not written: those of a state are, and others appear whole."""
    state = fitted(
        _State,
        folder.load_state() or {},
        folder.path,
        "its state",
        OutputError,
        "start again with --force",
    )
    return [n for n in range(state.shards, shards) if not _shard(folder, n).exists()]


def _save_state(folder: RunFolder, shards: int) -> None:
    """Record the shards up to the first one that is missing."""
    if is_main():
        folder.save_state({"shards": next(iter(_missing(folder, shards)), shards)})


def _distinct(rows: Sequence[Row]) -> list[tuple[bytes, Row]]:
    """Rows by digest, each once."""
    return list({key: (key, row) for row in rows for key in digests(row)}.values())


def _folder(job: Job, out: Path | None, resume: bool, force: bool) -> RunFolder:
    if out is None:
        raise UsageError(f"{STAGE} needs a place for its result", "give -o DIR")
    folder = RunFolder(out, identity(job))
    if is_main():
        folder.check(resume, force)
    return folder


def _record(
    job: Job,
    config: TeacherCacheConfig,
    metrics: JsonObject,
    teacher: HybridForCausalLM,
    tokenizer: "PreTrainedTokenizerBase",
) -> JsonObject:
    with open_checkpoint(job.source) as reader:
        options = config.model_dump(mode="json")
        record = lineage(STAGE, reader.lineage, reader.path, None, options, config.seed, metrics)
    known = identity(job)
    return record | {
        "cache": {
            "teacher": job.source,
            "teacher_sha256": known["source_sha256"],
            "vocab_size": teacher.config.vocab_size,
            "tokenizer_sha256": _vocabulary_digest(tokenizer),
            "data": known["data"],
            "data_sha256": known["data_sha256"],
            DAY: job.day and job.day.isoformat(),
            "rows": metrics["rows"],
            "tokens": metrics["tokens"],
            **{
                key: value
                for key, value in options.items()
                if key not in {*config.placement_options, "data"}
            },
        }
    }


def _vocabulary_digest(tokenizer: "PreTrainedTokenizerBase") -> str:
    """sha256 of every token with its number."""
    known = sorted(tokenizer.get_vocab().items(), key=lambda pair: pair[1])
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()


def _require_same(
    job: Job,
    config: HeldOutConfig,
    student: HybridForCausalLM,
    folder: Path,
    kept: JsonObject,
    temperature: float,
) -> None:
    """Raise UsageError where the cache speaks of other distributions than the run asks for."""
    again = _command(job, config, kept, temperature)
    if kept["temperature"] != temperature:
        raise UsageError(
            f"{folder} was drawn at temperature {kept['temperature']:g}, not at {temperature:g}",
            again,
        )
    sizes = kept["vocab_size"], student.config.vocab_size
    if sizes[0] != sizes[1] or kept["tokenizer_sha256"] != _vocabulary_digest(job.tokenizer()):
        raise UsageError(
            f"{folder} was made with another vocabulary ({sizes[0]} and {sizes[1]} tokens)", again
        )
    given = config.teacher
    if given is not None and header_digest(resolve(given).path) != kept["teacher_sha256"]:
        raise UsageError(f"{folder} was drawn from {kept['teacher']}, not from {given}", again)


def _command(job: Job, config: HeldOutConfig, kept: JsonObject, temperature: float) -> str:
    """The line that makes the cache of a run; options of the usual value are left out."""
    words = ["mambactl", STAGE, config.teacher or kept["teacher"]]
    words += [word for spec in config.data for word in ("--data", spec)]
    usual = TeacherCacheConfig.model_fields
    asked = {name: getattr(config, name) for name in ROW_OPTIONS if hasattr(config, name)}
    # drawn by one process, for the rows of all
    asked["batch_size"] *= job.processes
    for name, value in (asked | {"temperature": temperature}).items():
        flag = name.replace("_", "-")
        if value == usual[name].default or (name == "max_steps" and config.epochs):
            continue
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", f"{value}"]
    return shlex.join([*words, "-o", str(config.teacher_cache), "--force"])
