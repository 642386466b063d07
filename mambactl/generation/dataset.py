"""`generate --dataset`: a model answers every prompt of a set, once, into a file that sft reads.

Sequence-level knowledge distillation (Kim and Rush, arXiv 1606.07947) trains the student on these
pseudo-labels. What is decoded together is fixed by the set and the options alone, and every batch
is on disk before the next begins: a run that was killed continues at the batch it lost, and its
file is that of a run that was not. Random numbers belong to a prompt, sample and turn. Several
processes answer the same batches, each the next one when it is free, and the main one writes OUT.
"""

import json
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

from mambactl import console
from mambactl.checkpoint.load import open_checkpoint
from mambactl.checkpoint.provenance import lineage
from mambactl.checkpoint.run_folder import RunFolder, begun_on
from mambactl.data.answers import Answer, Group, write_answers
from mambactl.decode.backend import AnyEngine
from mambactl.decode.prefix_files import PrefixFolder
from mambactl.decode.prompts import encode_all
from mambactl.errors import OutputError, UsageError
from mambactl.files import LINEAGE, explained, replacing
from mambactl.generation import decoding
from mambactl.generation.answer_files import FREE, OtherAnswers, WrittenAnswers
from mambactl.generation.dealing import Deal
from mambactl.generation.question_set import PROMPTS, QuestionSet, Task, as_prompt, asked_identity
from mambactl.metrics import Numbers
from mambactl.options import ROW_SUFFIXES, GenerateConfig
from mambactl.ranks import is_main, processes
from mambactl.stage_result import StageResult

STAGE = "generate"
STATUS_SECONDS = 0.5
# of every batch
COUNTED = ("prompt_tokens", "prompt_from_files", "tokens", "drafted", "accepted")
# answers worth a word about a batch size of 1
FEW = 16


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
    deal = Deal()
    day = deal.day(begun_on(out, resume))
    folder = RunFolder(out, asked_identity(config, source, day))
    folder.side = (LINEAGE,)
    if is_main():
        # before a tokenizer is loaded and every row is read
        folder.check(resume, force, later={PROMPTS})
    questions = QuestionSet.of(config, source, day)
    folder.mark |= questions.identity
    if not is_main():
        _decode(questions, OtherAnswers(folder, questions.digest), deal, prefix_folder)
        return StageResult(str(out), {})
    with folder.open(resume, force):
        written = WrittenAnswers(folder, questions.digest)
        with written.file:
            _decode(questions, written, deal, prefix_folder)
            with explained(folder.path, FREE):
                metrics = _write_result(questions, written, folder)
                folder.finish()
        folder.publish()
    console.log(f"wrote {out}: {_summary(metrics, config.prefix_cache)}")
    return StageResult(str(out), metrics)


def _decode(
    questions: QuestionSet,
    files: WrittenAnswers | OtherAnswers,
    deal: Deal,
    folder: PrefixFolder | None,
) -> None:
    """Answer every batch that is not done yet, as one of the processes of the run."""
    batches = questions.batches()
    files.gather()
    left = deal.left(files.run, files.left(len(batches)))
    mine = deal.numbers(left)
    total = sum(map(len, batches))
    before = total - sum(len(batches[number]) for number in left)
    if before:
        console.log(f"{before} of {total} answers were written before")
    # a process without a batch needs no model
    first = next(mine, None)
    decoder = None if first is None else _Decoder.of(questions, folder)
    with console.progress("answers", total) as bar:
        meter, started = _Meter(bar, deal, before), time.perf_counter()
        if decoder is not None and first is not None:
            for number in chain([first], mine):
                files.add(number, *decoder.answer(batches[number], meter))
                meter.show(len(batches[number]))
        deal.leave()
        for _ in deal.others():
            files.gather()
            meter.show()
        seconds = time.perf_counter() - started
    # of all processes, with the wait for the last one
    console.log(f"answers: {total - before:,} in {seconds:.2f} s", level=2)
    files.require_all(len(batches))


@dataclass(frozen=True)
class _Decoder:
    """The engine that answers batches, and what prompts are encoded with."""

    questions: QuestionSet
    setup: decoding.Setup
    engine: AnyEngine

    @classmethod
    def of(cls, questions: QuestionSet, folder: PrefixFolder | None) -> "_Decoder":
        """Load the models."""
        config = questions.config
        if config.draft and config.k == "auto":
            console.log(
                f"k is {questions.k}: an automatic one follows the clock, and text may follow it"
            )
        answers = len(questions.conversations) * config.samples_per_prompt
        if len(questions.batches()) == answers > FEW:
            console.log("one answer at a time: a --batch-size of 16, say, is faster")
        setup = decoding.prepare(config, questions.source, [])
        setup = replace(setup, k=questions.k, folder=folder)
        return cls(questions, setup, setup.engine())

    def answer(
        self, batch: Sequence[Task], meter: "_Meter"
    ) -> tuple[list[tuple[int, Answer]], dict[str, float]]:
        """Write every turn of a batch, all conversations together, the next on the last one's."""
        started = time.perf_counter()
        questions, setup = self.questions, self.setup
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
            result = self.engine.generate(prompts, params, meter.heard, keys)
            for row, new, reason in zip(rows, result.tokens, result.finish, strict=True):
                texts[row].append(setup.text(new))
                tokens[row] += len(new)
                if reason == "length":
                    finish[row] = reason
            for name in COUNTED:
                totals[name] += getattr(result.stats, name)
        # processes decode at the same time
        seconds = (time.perf_counter() - started) / processes()
        now = time.time()
        return [
            (task.prompt, Answer(task.sample, tuple(texts[row]), finish[row], tokens[row], now))
            for row, task in enumerate(batch)
        ], {**totals, "seconds": seconds}


def _write_result(
    questions: QuestionSet, written: WrittenAnswers, folder: RunFolder
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
    """Answers done in all processes, and how fast tokens come in this one."""

    def __init__(self, bar: console.Task, deal: Deal, before: int):
        self.bar, self.deal, self.tokens = bar, deal, 0
        self.started = self.shown = time.monotonic()
        bar.advance(before)

    def heard(self, row: int, new: list[int]) -> None:
        """Count a step's tokens of one row."""
        self.tokens += len(new)
        now = time.monotonic()
        if now - self.shown >= STATUS_SECONDS:
            self.shown = now
            self.show()

    def show(self, more: int = 0) -> None:
        """Show what is done, with `more` answers of this process."""
        seconds = time.monotonic() - self.started
        rate = self.tokens / seconds if seconds else 0.0
        status = f"{self.tokens:,} tokens, {rate:.1f} tokens/s"
        self.bar.advance(self.deal.done(more), status)


def _require_name(config: GenerateConfig, out: Path) -> None:
    """Refuse a name that no reader of the format would take."""
    suffix = ROW_SUFFIXES[config.format]
    if not out.name.endswith(suffix):
        raise UsageError(f"{out} does not end in {suffix}, as {config.format} does", "see -o")
    if out.is_dir():
        raise OutputError(f"{out} is a folder", "give the name of a file with -o")
