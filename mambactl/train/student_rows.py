"""On-policy distillation: rows that the student writes as it is now, for the teacher to score.

The decode engine answers prompts with a copy of the student's weights that is refreshed after every
optimiser step; prompts with their answers fill packed rows, and only written tokens are learned.
What is written follows from the weights, the seed and the number of the batch alone, so that a run
that resumes, and several processes that share it, write the same. TRL's on-policy trainers (GKD,
and `DistillationTrainer`) write with transformers' `generate` or vLLM, of which neither is this
engine, and train on padded rows with one answer each.
"""

import time
from collections import deque
from collections.abc import Collection, Generator, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from typing import NamedTuple

import numpy as np
import torch

from mambactl.data.encoding import Example
from mambactl.data.pack import Batch, Row, blank_row, collate, drawn_rows, pack
from mambactl.decode.refresh import DecodingCopy
from mambactl.decode.sampler import SamplingParams
from mambactl.errors import ResourceError
from mambactl.models.hybrid import HybridForCausalLM
from mambactl.options import DistillConfig
from mambactl.ranks import processes, rank, total
from mambactl.train.drawn_prompts import DrawnPrompts, Tokens, answers_at_most
from mambactl.train.ledger import Written

# answers of a batch at most: their number is the lower part of a sampling key
KEYS = 1 << 20


class Answered(NamedTuple):
    """A prompt and what the student wrote behind it; `ended` if with an end token."""

    prompt: Tokens
    answer: Tokens
    ended: bool

    @property
    def example(self) -> Example:
        """The document; written tokens alone are learned."""
        ids = np.array([*self.prompt, *self.answer], np.int32)
        mask = np.zeros(len(ids), bool)
        mask[len(self.prompt) :] = True
        return Example(ids, mask)


class StudentRows:
    """Feed of an on-policy phase: batches whose first rows the student writes when they are asked.

    Its other rows are those of the data. The copy that writes has weights in `dtype`; `trained`
    names the student's parameters that change. Without `trim` all batches have one shape.
    """

    def __init__(
        self,
        config: DistillConfig,
        dtype: torch.dtype,
        student: HybridForCausalLM,
        trained: Collection[str],
        prompts: DrawnPrompts,
        rows: Sequence[Row],
        trim: bool = True,
    ):
        self.config, self.dtype = config, dtype
        self.student, self.trained, self.prompts = student, trained, prompts
        self.rows, self.trim = rows, trim
        self.written = config.rows_written(config.batch_size)
        self.most = answers_at_most(config, prompts.shortest)
        self.params = SamplingParams(
            temperature=config.onpolicy_temperature,
            max_new_tokens=config.onpolicy_tokens,
            eos_token_ids=tuple(prompts.ends),
            seed=config.seed,
        )
        self._counts: deque[Written] = deque()

    @contextmanager
    def open(self, done: int) -> Iterator[Iterator[Batch]]:
        """Batches from number `done` on, and the copy that writes them as long as they last."""
        copy = DecodingCopy(self.student, self.trained, self.dtype)
        copy.reserve(self.most, self.prompts.longest + self.config.onpolicy_tokens)
        batches = self._batches(copy, done)
        try:
            yield batches
        finally:
            # it holds the copy
            batches.close()

    def take_counts(self) -> Written:
        """Return the counts of the oldest step that is not logged yet, over all processes."""
        return self._counts.popleft()

    def _batches(self, copy: DecodingCopy, done: int) -> Generator[Batch, None, None]:
        config, share = self.config, (rank(), processes())
        given = config.batch_size - self.written
        others = drawn_rows(self.rows, given, config.seed, done, share) if given else None
        step = Written()
        for number in count(done):
            if number % config.grad_accum == 0:
                copy.refresh()
                step = Written()
            started = time.perf_counter()
            answers = self._answers(copy, number * processes() + rank())
            step += _counted(answers, time.perf_counter() - started)
            if number % config.grad_accum == config.grad_accum - 1:
                self._counts.append(step)
            rows = self._packed([each.example for each in answers])
            if not self.trim:
                rows += [blank_row(config.max_length)] * (self.written - len(rows))
            yield collate([*rows, *(next(others) if others else [])], self.trim)

    def _answers(self, copy: DecodingCopy, number: int) -> list[Answered]:
        """The answers of a batch, by its number among those of all processes."""
        prompts = self._fitting(self.prompts.draw(self.config.seed, number, self.most))
        keys = range(number * KEYS, number * KEYS + len(prompts))
        try:
            found = copy.generate(prompts, self.params, keys)
        except torch.OutOfMemoryError as error:
            raise ResourceError(
                f"out of memory while the student writes {len(prompts)} answers: {error}",
                "lower --onpolicy-tokens (of draft: --answer-tokens), or halve --batch-size and "
                "double --grad-accum",
            ) from error
        written = zip(prompts, found.tokens, found.finish, strict=True)
        return [Answered(prompt, answer, end == "eos") for prompt, answer, end in written]

    def _fitting(self, prompts: Sequence[Tokens]) -> list[Tokens]:
        """The first prompts, as many as rows hold if no answer ends before it has to."""
        left = [self.config.max_length] * self.written
        for number, prompt in enumerate(prompts):
            need = len(prompt) + self.config.onpolicy_tokens
            row = next((row for row, room in enumerate(left) if room >= need), None)
            if row is None:
                return list(prompts[:number])
            left[row] = left[row] - need if self.config.packing else 0
        return list(prompts)

    def _packed(self, examples: Sequence[Example]) -> list[Row]:
        """Rows of the documents, at most the student's."""
        rows = pack(examples, self.config.max_length, self.config.packing)
        # now and then shorter documents need a row more than the longest that they might have been
        return rows[: self.written]


def _counted(answers: Sequence[Answered], seconds: float) -> Written:
    """Sum the answers of a batch over all processes."""
    tokens = sum(len(each.answer) for each in answers)
    ended = sum(each.ended for each in answers)
    tokens, number, ended = total(torch.tensor([tokens, len(answers), ended])).tolist()
    return Written(tokens, number, ended, seconds)
