"""The text that a draft learns from: rows that are there, or what its target writes meanwhile."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice

import torch
from torch import Tensor

from mambactl import console
from mambactl.checkpoint.run_folder import RunFolder
from mambactl.data.bad_rows import BadRows
from mambactl.data.encoding import Example
from mambactl.data.format import Rules, encode_rows
from mambactl.data.mixture import shares
from mambactl.data.pack import Batch, Row, collate
from mambactl.data.sources import Document
from mambactl.errors import UsageError
from mambactl.json_values import JsonObject
from mambactl.models.hybrid import HybridForCausalLM
from mambactl.options import DistillConfig, DraftConfig
from mambactl.present import of_kind
from mambactl.train.drawn_prompts import DrawnPrompts, prompts_of
from mambactl.train.epochs import with_steps
from mambactl.train.frequent_tokens import (
    COUNTED_STEPS,
    COUNTED_TOKENS,
    CountedRows,
    counted,
    frequent,
    keep,
    kept,
    of_batches,
    of_examples,
    of_rows,
)
from mambactl.train.job import Job
from mambactl.train.rows import (
    held_out_rows,
    read_documents,
    require_held_out,
    training_rows,
)
from mambactl.train.student_rows import StudentRows

# of so many rows or prompts one is held out, and of the latter at most so many
HELD_EVERY, HELD_PROMPTS = 20, 128
# batches of held-out answers, however short they are
HELD_BATCHES = 64


@dataclass(frozen=True)
class DraftText:
    """Rows to learn from, or prompts that the target answers; with the loop's own options.

    `held_rows` or `held_prompts` are for measuring; `documents` are what the prompts came from.
    """

    job: Job
    config: DistillConfig
    rows: Sequence[Row] = ()
    prompts: DrawnPrompts | None = None
    held_rows: Sequence[Row] = ()
    held_prompts: DrawnPrompts | None = None
    documents: Sequence[Document] = ()

    @classmethod
    def of(cls, job: Job, config: DraftConfig) -> "DraftText":
        """Read the data of a run; raises UsageError where it holds nothing of use."""
        reading = replace(job, config=config.of_the_loop())
        return cls._of_rows(reading) if config.text == "data" else cls._of_prompts(reading)

    @classmethod
    def _of_rows(cls, job: Job) -> "DraftText":
        tokenizer, config = job.tokenizer(), of_kind(DistillConfig, job.config)
        rows, held = training_rows(job, tokenizer), held_out_rows(job, tokenizer)
        if not config.eval_data:
            indices = held_indices(len(rows), -(-config.eval_tokens // config.max_length))
            held = [row for number, row in enumerate(rows) if number in indices]
            rows = [row for number, row in enumerate(rows) if number not in indices]
        _tell_held_out(len(held), "rows")
        stepped = with_steps(job, len(rows))
        return cls(job, of_kind(DistillConfig, stepped.config), rows, held_rows=held)

    @classmethod
    def _of_prompts(cls, job: Job) -> "DraftText":
        config = of_kind(DistillConfig, job.config)
        shares(config.data)
        documents, prompts = _asked(job, config)
        if config.eval_data:
            require_held_out(config)
            _, held = _asked(job, _on_held_out(config))
        else:
            held, prompts = prompts.divided(held_indices(len(prompts.prompts), HELD_PROMPTS))
        console.log(f"{len(prompts.prompts):,} prompts to write on from")
        _tell_held_out(len(held.prompts), "prompts")
        return cls(job, config, prompts=prompts, held_prompts=held, documents=documents)

    def describe(self) -> JsonObject:
        """Counts for `--dry-run`."""
        if self.prompts is None or self.held_prompts is None:
            return {"rows": len(self.rows), "held_out_rows": len(self.held_rows)}
        counts = len(self.prompts.prompts), len(self.held_prompts.prompts)
        return dict(zip(("prompts", "held_out_prompts"), counts, strict=True))

    def feed(self, target: HybridForCausalLM) -> CountedRows | None:
        """Source of what the target writes, None where rows are there."""
        return None if self.prompts is None else CountedRows(self._written(target, self.prompts))

    def held_out(self, target: HybridForCausalLM) -> list[Batch]:
        """Batches to measure on: rows of the data, or what the target writes for other prompts."""
        size = self.config.batch_size
        if self.held_prompts is None:
            starts = range(0, len(self.held_rows), size)
            return [collate(self.held_rows[start : start + size]) for start in starts]
        found: list[Batch] = []
        if not self.held_prompts.prompts:
            return found
        most, tokens = self.config.eval_tokens, 0
        with (
            self._written(target, self.held_prompts).open(0) as source,
            console.progress("write held-out text", most) as task,
        ):
            for batch in islice(source, HELD_BATCHES):
                found.append(batch)
                task.advance(count := int(batch.loss_mask.sum()))
                if (tokens := tokens + count) >= most:
                    break
        return found

    def _written(self, target: HybridForCausalLM, prompts: DrawnPrompts) -> StudentRows:
        return StudentRows(self.config, self.job.dtype, target, (), prompts, [])

    def tokens(
        self, feed: CountedRows | None, size: int, config: DraftConfig, folder: RunFolder
    ) -> Tensor:
        """The tokens that the target writes most often, of a vocabulary of `size`.

        Those of the data come after what it was seen to write. A run that goes on has those that
        it began with.
        """
        if (most := config.vocabulary) >= size:
            return torch.arange(size)
        if (found := kept(folder, size)) is not None:
            return found
        if feed is None:
            ids = frequent([counted(of_rows(self.rows), size)], most)
        else:
            written = counted(of_batches(self.opening(feed, config)), size)
            ids = frequent([written, self._counts_of_data(size)], most)
        keep(folder, ids)
        return ids

    def opening(self, feed: CountedRows | None, config: DraftConfig) -> Sequence[Batch]:
        """Text of the first steps, which is written before them and then learned in them."""
        if feed is None:
            most = COUNTED_STEPS * config.batch_size
            rows = self.rows[:: -(-len(self.rows) // most)]
            starts = range(0, len(rows), config.batch_size)
            return [collate(rows[start : start + config.batch_size]) for start in starts]
        steps = min(COUNTED_STEPS, -(-config.max_steps // config.answer_uses))
        return feed.first or feed.write(steps * config.grad_accum)

    def _counts_of_data(self, size: int) -> Tensor:
        """Occurrences [V] of tokens in the documents that the prompts are from, answers and all."""
        rules = Rules(day=self.job.day, vocabulary=size)
        examples: list[Example] = []
        # chats need a template here, where their questions do without
        with suppress(UsageError):
            examples = encode_rows(
                self.documents,
                self.job.tokenizer(),
                max_tokens=COUNTED_TOKENS,
                seed=self.config.seed,
                bad=BadRows(skip=True),
                rules=rules,
            )
        return counted(of_examples(examples), size)


def _asked(job: Job, config: DistillConfig) -> tuple[list[Document], DrawnPrompts]:
    """Documents of `data`, which need no answers, and their prompts; UsageError for bad rows."""
    malformed, reading = BadRows(skip=config.skip_bad_rows), replace(job, config=config)
    documents = read_documents(reading, malformed)
    malformed.settle()
    prompts = prompts_of(reading, config, job.tokenizer(), documents, config.max_steps)
    return documents, prompts


def _on_held_out(config: DistillConfig) -> DistillConfig:
    """The options with `eval_data` in the place of the data, for as much as can be measured."""
    few = {"max_steps": HELD_BATCHES, "grad_accum": 1, "max_samples": None}
    return config.model_copy(update={"data": config.eval_data, **few})


def held_indices(count: int, most: int) -> range:
    """Evenly spread indices of what is held out of `count` things: a twentieth, at most `most`."""
    if count < HELD_EVERY or not most:
        return range(0)
    return range(0, count, max(HELD_EVERY, -(-count // most)))


def _tell_held_out(count: int, what: str) -> None:
    if count:
        console.log(f"held out: {count:,} {what}")
    else:
        console.log(f"no {what} are held out of so few: drafts are measured with --eval-data FILE")
