"""Drafts of a draft in training, on text of its target that it never trains on.

Every token is predicted behind the true text, by the first draft of a step, the second and so on.
A draft counts if all drafts before it in its step are right, so that the tokens of a step are
expected ones: 1 for the target's own, and for each further draft the chance of all up to it.
Steps begin everywhere alike here, and in decoding behind a token that was hard to guess, so that
real ones give a little less.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mambactl import console
from mambactl.data.pack import Batch
from mambactl.evaluation.fidelity import CHUNK_ELEMENTS
from mambactl.json_values import JsonObject
from mambactl.metrics import (
    ACCEPTANCE,
    AGREEMENT,
    DRAFTED_TOKENS,
    KL,
    STEP_TOKENS,
    hundredths,
    percent,
)
from mambactl.present import present
from mambactl.train.head_objective import HeadObjective
from mambactl.train.optimization import LogitsObjective, autocast, last_hidden, next_tokens

# tokens that a trimmed vocabulary should hold of those that are written
LEAST_COVERED = 0.97


class HeldOutDrafts:
    """Measurement of a draft as it is now, over the same batches every time; none are changed.

    `drafts` is the number of drafts a step. KL is over the tokens that the draft can draft.
    """

    def __init__(
        self, objective: HeadObjective | LogitsObjective, batches: Sequence[Batch], drafts: int
    ):
        self.objective, self.batches, self.drafts = objective, batches, drafts
        self.last: _Sums | None = None

    @torch.no_grad()
    def measure(self) -> JsonObject:
        """KL, and shares of first drafts that are kept: agreement if greedy, acceptance if drawn.

        Tokens per step are those of greedy decoding.
        """
        found = _Sums(self.drafts)
        for batch in self.batches:
            self._add(found, batch)
        self.last = found
        first, last = found.rows()[0], found.rows()[-1]
        return {
            KL.name: found.kl / max(1, found.tokens),
            AGREEMENT.name: first[AGREEMENT.name],
            ACCEPTANCE.name: first[ACCEPTANCE.name],
            STEP_TOKENS.name: last[STEP_TOKENS.name],
            "eval_tokens": found.tokens,
        }

    def facts(self) -> JsonObject:
        """The newest measurement whole: by number of drafts, and tokens that can be drafted."""
        if self.last is None:
            self.measure()
        found = present(self.last)
        return {
            "eval_tokens": found.tokens,
            "covered": found.covered / max(1, found.tokens),
            "drafts": found.rows(),
        }

    def _add(self, found: "_Sums", batch: Batch) -> None:
        own = self.objective
        head = isinstance(own, HeadObjective)
        model, target = (own.head.body, own.target) if head else (own.student, own.teacher)
        weight, theirs = model.lm_head.weight.float(), present(target).lm_head.weight.float()
        ids = own.head.ids if head else torch.arange(len(weight), device=weight.device)
        batch = batch.to(weight.device)
        with autocast(weight.device, own.amp):
            if head:
                truth, states = own.states(batch)
            else:
                truth, states = last_hidden(present(target), batch), [last_hidden(model, batch)]
        targets, mask = next_tokens(batch)
        found.tokens += int(mask.sum())
        found.covered += int(torch.isin(targets[mask], ids).sum())
        equal = torch.zeros(len(states), *mask.shape, device=weight.device)  # [S, B, T]
        shared = torch.zeros_like(equal)
        size = max(1, CHUNK_ELEMENTS // len(theirs))
        for indices in mask.nonzero().split(size):  # [N, 2]
            at = indices[:, 0], indices[:, 1]
            logits = truth[at].float() @ theirs.t()  # [N, V]
            top, chances = logits.argmax(-1), logits.softmax(-1)[:, ids]
            for number, state in enumerate(states):
                drafted = (state[at].float() @ weight.t()).log_softmax(-1)  # [N, Vt]
                equal[number][at] = (ids[drafted.argmax(-1)] == top).float()
                shared[number][at] = torch.minimum(chances, drafted.exp()).sum(-1)
                if number == 0:
                    wanted = logits[:, ids].log_softmax(-1)
                    found.kl += float((wanted.exp() * (wanted - drafted)).sum())
        found.add_steps(mask, batch.position_ids, equal, shared)


class _Sums:
    """Sums over the batches: of each draft behind the true text, and of all drafts up to it."""

    def __init__(self, drafts: int):
        self.tokens, self.covered, self.kl = 0, 0, 0.0
        # number, equal, shared; alone, and with all drafts before it
        self.alone = torch.zeros(drafts, 3, dtype=torch.float64)
        self.whole = torch.zeros(drafts, 3, dtype=torch.float64)

    def add_steps(self, mask: Tensor, positions: Tensor, equal: Tensor, shared: Tensor) -> None:
        """Add the drafts of steps from every token; mask and positions [B, T], others [S, B, T].

        A model that drafts alike at any place of a step has them once, S is 1.
        """
        inside = torch.ones_like(mask)
        chances = [torch.ones_like(equal[0]), torch.ones_like(shared[0])]
        for number in range(len(self.alone)):
            index = min(number, len(equal) - 1)
            # a step of so many drafts does not begin before the document
            valid = mask & (positions >= number)
            rates = [equal[index], shared[index]]
            self._add(self.alone[number], valid, rates)
            inside = inside & valid.roll(-number, 1)
            chances = [
                before * rate.roll(-number, 1) for before, rate in zip(chances, rates, strict=True)
            ]
            self._add(self.whole[number], inside, chances)

    def _add(self, sums: Tensor, valid: Tensor, rates: Sequence[Tensor]) -> None:
        sums += torch.stack([valid.sum(), *(rate[valid].sum() for rate in rates)]).cpu()

    def rows(self) -> list[JsonObject]:
        """For each number of drafts: shares of the last one kept, and tokens of a step."""
        found: list[JsonObject] = []
        tokens = torch.ones(2, dtype=torch.float64)
        for number, (alone, whole) in enumerate(zip(self.alone, self.whole, strict=True), 1):
            tokens = tokens + whole[1:] / whole[0].clamp(min=1)
            equal, shared = (alone[1:] / alone[0].clamp(min=1)).tolist()
            found.append(
                {
                    DRAFTED_TOKENS.name: number,
                    AGREEMENT.name: equal,
                    ACCEPTANCE.name: shared,
                    STEP_TOKENS.name: tokens[0].item(),
                    f"sampled_{STEP_TOKENS.name}": tokens[1].item(),
                }
            )
        return found


def show_drafts(facts: JsonObject) -> None:
    """Print what was measured by number of drafts; warns of a vocabulary that leaves out much."""
    rows = [
        (
            str(row[DRAFTED_TOKENS.name]),
            percent(row[AGREEMENT.name]),
            percent(row[ACCEPTANCE.name]),
            hundredths(row[STEP_TOKENS.name]),
            hundredths(row[f"sampled_{STEP_TOKENS.name}"]),
        )
        for row in facts["drafts"]
    ]
    columns = ("drafts", "kept, greedy", "kept, drawn", "tokens/step, greedy", "drawn")
    title = f"expected, on {facts['eval_tokens']:,} held-out tokens"
    console.table(title, columns, rows)
    if facts["covered"] < LEAST_COVERED:
        console.warn(
            f"the head can draft {percent(facts['covered'])} of the held-out tokens: "
            "raise --vocabulary, or --max-steps so that more text is counted"
        )
