"""The text that a draft learns from: rows that are there, or what its target writes meanwhile."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mambactl.checkpoint.run_folder import RunFolder
from mambactl.data.pack import Row
from mambactl.models.hybrid import HybridForCausalLM
from mambactl.options import DistillConfig, DraftConfig
from mambactl.options.on_policy import STAGE as ON_POLICY
from mambactl.present import of_kind
from mambactl.train.drawn_prompts import DrawnPrompts, drawn_prompts
from mambactl.train.epochs import with_steps
from mambactl.train.frequent_tokens import (
    COUNTED_STEPS,
    CountedRows,
    counted,
    frequent,
    keep,
    kept,
    of_batches,
    of_rows,
)
from mambactl.train.job import Job
from mambactl.train.phases import PhasePlan
from mambactl.train.rows import training_rows
from mambactl.train.student_rows import StudentRows


@dataclass(frozen=True)
class DraftText:
    """Rows to learn from, or prompts that the target answers; with the loop's own options."""

    config: DistillConfig
    rows: Sequence[Row]
    prompts: DrawnPrompts | None

    @classmethod
    def of(cls, job: Job, config: DraftConfig) -> "DraftText":
        """Read the data of a run; raises UsageError where it holds nothing of use."""
        loop, tokenizer = config.of_the_loop(), job.tokenizer()
        reading = replace(job, config=loop)
        if config.text == "data":
            rows = training_rows(reading, tokenizer)
            return cls(of_kind(DistillConfig, with_steps(reading, len(rows)).config), rows, None)
        answering = PhasePlan(ON_POLICY, ON_POLICY, config.max_steps, (), 0.0, 0.0)
        return cls(loop, [], drawn_prompts(reading, loop, tokenizer, [answering], checked=False))

    def feed(self, job: Job, target: HybridForCausalLM) -> CountedRows | None:
        """Source of what the target writes, None where rows are there."""
        if self.prompts is None:
            return None
        return CountedRows(StudentRows(self.config, job.dtype, target, (), self.prompts, []))

    def tokens(self, feed: CountedRows | None, size: int, most: int, folder: RunFolder) -> Tensor:
        """The `most` tokens that the target writes most often, of a vocabulary of `size`.

        A run that goes on has those that it began with.
        """
        if most >= size:
            return torch.arange(size)
        if (found := kept(folder, size)) is not None:
            return found
        if feed is None:
            learned = of_rows(self.rows)
        else:
            steps = min(COUNTED_STEPS, self.config.max_steps)
            learned = of_batches(feed.write(steps * self.config.grad_accum))
        ids = frequent(counted(learned, size), most)
        keep(folder, ids)
        return ids
