"""The open batch of the reference engine: every row is a batch of its own, a pass each per step."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from mambactl.decode.drafters import Drafter, ModelDrafter
from mambactl.decode.engine import Engine, Generation, RunningBatch
from mambactl.decode.head_drafter import HeadDrafter, HeadReading
from mambactl.decode.open_batch import Likely, LikelyTable, RowRequest, Written
from mambactl.decode.prompt_reading import ReadPrompt, ReadRows
from mambactl.decode.sampler import Sampler
from mambactl.models.hybrid import HybridForCausalLM
from mambactl.present import present


@dataclass
class _Row:
    """A row with its own engine, so that its drafter has a state of its own."""

    engine: Engine
    request: RowRequest
    prompt: ReadPrompt
    batch: RunningBatch
    output: Generation
    started: bool = False


class RowByRow:
    """Rows that share nothing but the weights; see `OpenBatch`."""

    def __init__(
        self,
        target: HybridForCausalLM,
        make_drafter: Callable[[], Drafter | None],
        k: int,
        rows: int,
        eos: Sequence[int],
    ):
        self.target, self.make_drafter, self.k, self.most = target, make_drafter, k, rows
        self.eos = tuple(eos)
        self.rows: dict[int, _Row] = {}
        # the only row of what was read
        self.first = torch.zeros(1, dtype=torch.long, device=target.device)

    @property
    def room(self) -> int:
        """Number of rows that may still join."""
        return self.most - len(self.rows)

    @property
    def running(self) -> int:
        """Number of rows under way."""
        return len(self.rows)

    @torch.no_grad()
    def join(self, row: int, request: RowRequest, prompt: ReadPrompt) -> None:
        """Add a row, whose first token comes with the next step."""
        drafter = self.make_drafter()
        if isinstance(drafter, ModelDrafter):
            drafter.prefix = prompt.draft
        if isinstance(drafter, HeadDrafter):
            own = present(prompt.draft).select(self.first)
            drafter.reading = HeadReading(drafter.head, own, prompt.hidden)
        engine = Engine(self.target, drafter, self.k, share=False)
        cache = prompt.target.select(self.first)
        # what was read without recording is permanent
        cache.recording = self.k > 0
        hidden = self.target.model.norm(prompt.hidden)
        params = replace(request.params, eos_token_ids=self.eos)
        sampler = Sampler(params, [request.key], self.target.device)
        batch = engine.begin(cache, hidden, sampler)
        self.rows[row] = _Row(engine, request, prompt, batch, Generation([[]], ["length"]))

    def join_all(self, rows: Sequence[tuple[int, RowRequest]], read: ReadRows) -> None:
        """Add a row for each of the prompts that were read together."""
        for index, (row, request) in enumerate(rows):
            self.join(row, request, read.prompt(index))

    def leave(self, row: int) -> None:
        """Drop a row; one that is not under way is ignored."""
        self.rows.pop(row, None)

    def step(self) -> list[Written]:
        """Take every row a token further, or several."""
        return [self._step(name, row) for name, row in list(self.rows.items())]

    def _step(self, name: int, row: _Row) -> Written:
        stats, batch = row.output.stats, row.batch
        drafted, accepted = stats.drafted, stats.accepted
        before, logits = len(row.output.tokens[0]), batch.logits
        if row.started:
            row.engine.advance(batch, row.output, None)
            logits = batch.logits
        else:
            row.started = True
            row.engine.hand_over(batch, [row.prompt.tokens], row.output, None)
        new = row.output.tokens[0][before:]
        likely: list[Likely] | None = None
        if row.request.likely:
            tokens = torch.tensor([new], device=logits.device)
            likely = LikelyTable.of(logits[:, : len(new)], tokens).row(0, len(new))
        finish = None if batch.rows else row.output.finish[0]
        if finish is not None:
            del self.rows[name]
        return Written(
            name, new, likely, finish, stats.drafted - drafted, stats.accepted - accepted
        )
