"""`generate --dataset`: a model answers every prompt of a set, once, into a file that sft reads.

Sequence-level knowledge distillation (Kim and Rush, arXiv 1606.07947) trains the student on these
pseudo-labels. What is decoded together is fixed by the set and the options alone, and every batch
is on disk before the next begins: a run that was killed continues at the batch it lost, and its
file is that of a run that was not. Random numbers belong to a prompt, sample and turn.
"""

import json
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import BinaryIO

from pydantic import BaseModel, Field

from mambactl import console
from mambactl.checkpoint.load import open_checkpoint
from mambactl.checkpoint.provenance import lineage
from mambactl.checkpoint.run_folder import RunFolder, begun_on
from mambactl.data.answers import Answer, Group, write_answers
from mambactl.data.conversations import Conversation
from mambactl.decode.backend import AnyEngine
from mambactl.decode.prefix_files import PrefixFolder
from mambactl.decode.prompts import encode_all
from mambactl.errors import OutputError, UsageError
from mambactl.files import LINEAGE, explained, replacing
from mambactl.foreign import fitted, json_object
from mambactl.generation import decoding
from mambactl.generation.question_set import QuestionSet, Task, as_prompt
from mambactl.metrics import Numbers
from mambactl.options import ROW_SUFFIXES, GenerateConfig
from mambactl.stage_result import StageResult

STAGE = "generate"
STATUS_SECONDS = 0.5
# of every batch
COUNTED = ("prompt_tokens", "prompt_from_files", "tokens", "drafted", "accepted")
# answers worth a word about a batch size of 1
FEW = 16
_FREE = "free some disk space, then use --resume"
_AGAIN = "start again with --force"


def run(
    config: GenerateConfig,
    source: str,
    out: Path | None,
    *,
    resume: bool = False,
    force: bool = False,
) -> StageResult:
    """Answer every prompt of `dataset` into the file `out`; see GenerateConfig for the options."""
    if out is None:
        raise UsageError(f"{STAGE} --dataset needs a place for its result", "give -o FILE.jsonl")
    _require_name(config, out)
    prefix_folder = decoding.prefix_folder(config)
    questions = QuestionSet.of(config, source, begun_on(out, resume))
    folder = RunFolder(out, questions.identity)
    folder.side = (LINEAGE,)
    folder.check(resume, force)
    with folder.open(resume, force):
        written = _Written(folder)
        with written.file:
            _decode(questions, written, prefix_folder)
            with explained(folder.path, _FREE):
                metrics = _write_result(questions, written, folder)
                folder.finish()
        folder.publish()
    console.log(f"wrote {out}: {_summary(metrics, config.prefix_cache)}")
    return StageResult(str(out), metrics)


class _State(BaseModel):
    """Batches and bytes that are on disk, and what they took."""

    batches: int = Field(default=0, ge=0)
    bytes: int = Field(default=0, ge=0)
    totals: dict[str, float] = {}


class _Line(BaseModel):
    """One answer as a line of the working file holds it."""

    prompt: int
    sample: int
    texts: tuple[str, ...]
    finish: str
    tokens: int
    time: float


class _Written:
    """The answers that are on disk, in the order they were decoded, and what they took.

    A line holds a prompt's number and one Answer. What follows the last state is forgotten.
    """

    def __init__(self, folder: RunFolder):
        self.folder = folder
        found = folder.load_state() or {}
        state = fitted(_State, found, folder.path, "its state", OutputError, _AGAIN)
        self.batches = state.batches
        self.totals = Counter(state.totals)
        # no name that the result itself may have
        path = folder.path / "decoded.partial"
        with explained(path, _FREE):
            path.touch()
            if path.stat().st_size < state.bytes:
                raise OutputError(f"{path} lost what was written", _AGAIN)
            self.file: BinaryIO = path.open("r+b")
            self.file.truncate(state.bytes)
            self.file.seek(state.bytes)

    def add(self, answers: Sequence[tuple[int, Answer]], totals: Mapping[str, float]) -> None:
        """Append a whole batch; after this it is never decoded again."""
        with explained(self.folder.path, _FREE):
            for prompt, answer in answers:
                line = json.dumps({"prompt": prompt, **asdict(answer)}, ensure_ascii=False)
                self.file.write(line.encode() + b"\n")
            self.file.flush()
            os.fsync(self.file.fileno())
        self.batches += 1
        self.totals.update(totals)
        self.folder.save_state(
            {"batches": self.batches, "bytes": self.file.tell(), "totals": dict(self.totals)}
        )

    def groups(self, conversations: Sequence[Conversation]) -> Iterator[Group]:
        """Every prompt with its samples, in the order of the set; one prompt in memory."""
        offsets: dict[int, list[int]] = {}
        self.file.seek(0)
        offset = 0
        for line in self.file:
            offsets.setdefault(self._parsed(line).prompt, []).append(offset)
            offset += len(line)
        for prompt, conversation in enumerate(conversations):
            answers = []
            for begin in offsets.get(prompt, ()):
                self.file.seek(begin)
                found = self._parsed(self.file.readline())
                answers.append(Answer(**found.model_dump(exclude={"prompt"})))
            yield conversation, sorted(answers, key=lambda answer: answer.sample)

    def _parsed(self, line: bytes) -> _Line:
        where = (self.file.name, "an answer", OutputError, _AGAIN)
        return fitted(_Line, json_object(line, *where), *where)


def _decode(questions: QuestionSet, written: _Written, folder: PrefixFolder | None) -> None:
    """Answer every batch that is not done yet."""
    batches = questions.batches()
    total, done = sum(map(len, batches)), sum(map(len, batches[: written.batches]))
    if done:
        console.log(f"{done} of {total} answers were written before")
    if written.batches == len(batches):
        return
    if questions.config.draft and questions.config.k == "auto":
        console.log(
            f"k is {questions.k}: an automatic one follows the clock, and text may follow it"
        )
    if len(batches) == total > FEW:
        console.log("one answer at a time: a --batch-size of 16, say, is faster")
    setup = decoding.prepare(questions.config, questions.source, [])
    setup = replace(setup, k=questions.k, folder=folder)
    engine = setup.engine()
    with console.progress("answers", total) as bar:
        meter = _Meter(bar)
        meter.advance(done)
        for batch in batches[written.batches :]:
            started = time.perf_counter()
            answers, totals = _answer(questions, setup, engine, batch, meter)
            written.add(answers, {**totals, "seconds": time.perf_counter() - started})
            meter.advance(len(batch))


def _answer(
    questions: QuestionSet,
    setup: decoding.Setup,
    engine: AnyEngine,
    batch: Sequence[Task],
    meter: "_Meter",
) -> tuple[list[tuple[int, Answer]], Counter]:
    """Write every turn of a batch, all conversations together, the next turn on the last one's."""
    texts: list[list[str]] = [[] for _ in batch]
    finish, tokens = ["eos"] * len(batch), [0] * len(batch)
    totals: Counter = Counter()
    temperature = questions.temperature(batch[0].prompt)
    params = replace(setup.params, temperature=temperature)
    asked = [questions.conversations[task.prompt] for task in batch]
    for turn in range(max(each.n_answers for each in asked)):
        rows = [row for row, each in enumerate(asked) if turn < each.n_answers]
        given = (as_prompt(asked[row], texts[row]) for row in rows)
        prompts = encode_all(given, setup.tokenizer, questions.config.chat, questions.day)
        keys = [asked[row].key(batch[row].sample, turn) for row in rows]
        result = engine.generate(prompts, params, meter.heard, keys)
        for row, new, reason in zip(rows, result.tokens, result.finish, strict=True):
            texts[row].append(setup.text(new))
            tokens[row] += len(new)
            if reason == "length":
                finish[row] = reason
        for name in COUNTED:
            totals[name] += getattr(result.stats, name)
    now = time.time()
    return [
        (task.prompt, Answer(task.sample, tuple(texts[row]), finish[row], tokens[row], now))
        for row, task in enumerate(batch)
    ], totals


def _write_result(
    questions: QuestionSet, written: _Written, folder: RunFolder
) -> dict[str, object]:
    """Write the file and what it was made from; returns the counts."""
    config, counts = questions.config, Counter()
    groups = _chosen(written.groups(questions.conversations), questions, counts)
    with folder.result.open("w", encoding="utf-8", newline="\n") as file:
        rows = write_answers(file, groups, config.format, questions.generator)
        file.flush()
        os.fsync(file.fileno())
    if not rows and counts["answers"]:
        raise UsageError(
            f"none of {counts['answers']} answers ended within {config.max_new_tokens} tokens",
            "--resume --keep-unfinished writes them as they are; --force with a larger "
            "--max-new-tokens decodes them again",
        )
    metrics = {**questions.counts, **counts, "rows_written": rows, **_speed(written.totals)}
    with open_checkpoint(questions.source) as reader:
        options = config.model_dump(mode="json")
        parent = reader.lineage
        record = lineage(STAGE, parent, reader.path, None, options, config.seed, metrics)
    record["questions"] = questions.identity
    with replacing(folder.path / LINEAGE) as new:
        new.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", "utf-8")
    return metrics


def _chosen(groups: Iterator[Group], questions: QuestionSet, counts: Counter) -> Iterator[Group]:
    """Leave out repeated answers to one prompt, and unless asked for those without an end."""
    counts.update(dict.fromkeys(("answers", "unfinished", "empty", "repeated_answers"), 0))
    for conversation, answers in groups:
        seen: set[tuple[str, ...]] = set()
        kept = []
        for answer in answers:
            cut = answer.finish == "length"
            empty = not all(text.strip() for text in answer.texts)
            counts["answers"] += 1
            counts["unfinished"] += cut
            counts["empty"] += empty
            if (cut or empty) and not questions.keep_unfinished:
                continue
            if questions.unique and answer.texts in seen:
                counts["repeated_answers"] += 1
                continue
            seen.add(answer.texts)
            kept.append(answer)
        yield conversation, kept


def _speed(totals: Mapping[str, float]) -> dict[str, object]:
    """Totals and rates of all decoding, also before a kill."""
    seconds, drafted = totals["seconds"], totals["drafted"]
    return {
        "prompt_tokens": totals["prompt_tokens"],
        "prompt_from_files": totals["prompt_from_files"],
        "tokens": totals["tokens"],
        "seconds": round(seconds, 3),
        "tokens_per_second": round(totals["tokens"] / seconds, 3) if seconds else 0.0,
        "acceptance": round(totals["accepted"] / drafted, 4) if drafted else None,
    }


def _summary(metrics: Numbers, prefix_cache: str | None) -> str:
    parts = [
        f"{metrics['rows_written']} rows of {metrics['answers']} answers to {metrics['prompts']} "
        f"prompts, {metrics['tokens']:,} tokens at {metrics['tokens_per_second']:.1f} tokens/s"
    ]
    for name in ("repeated_prompts", "bad_rows", "unfinished", "empty", "repeated_answers"):
        if metrics[name]:
            parts.append(f"{name.replace('_', ' ')}: {metrics[name]}")
    if metrics["acceptance"] is not None:
        parts.append(f"{metrics['acceptance']:.0%} of drafted tokens accepted")
    if prefix_cache is not None:
        given, tokens = (int(metrics[name]) for name in ("prompt_from_files", "prompt_tokens"))
        parts.append(decoding.from_files(given, tokens, prefix_cache))
    return "; ".join(parts)


class _Meter:
    """Answers done, and how fast tokens come in this process."""

    def __init__(self, bar: console.Task):
        self.bar, self.tokens = bar, 0
        self.started = self.shown = time.monotonic()

    def heard(self, row: int, new: list[int]) -> None:
        """Count a step's tokens of one row."""
        self.tokens += len(new)
        now = time.monotonic()
        if now - self.shown >= STATUS_SECONDS:
            self.shown = now
            self.advance(0)

    def advance(self, answers: int) -> None:
        """Show `answers` more."""
        seconds = time.monotonic() - self.started
        rate = self.tokens / seconds if seconds else 0.0
        self.bar.advance(answers, f"{self.tokens:,} tokens, {rate:.1f} tokens/s")


def _require_name(config: GenerateConfig, out: Path) -> None:
    """Refuse a name that no reader of the format would take."""
    suffix = ROW_SUFFIXES[config.format]
    if not out.name.endswith(suffix):
        raise UsageError(f"{out} does not end in {suffix}, as {config.format} does", "see -o")
    if out.is_dir():
        raise OutputError(f"{out} is a folder", "give the name of a file with -o")
