"""Measurement of a draft in training, on text of its target that it never trains on.

Every token is predicted behind the true text, as the first draft of a step, the second and so on.
From the chance that each is kept follows how many steps decoding would take to write the text: a
step begins behind the first token that the step before did not draft right.
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
        found.add_steps(mask, batch.position_ids, [equal, shared])


class _Sums:
    """Sums over the batches, by draft of a step: how often it is kept, and steps of so many."""

    def __init__(self, drafts: int):
        self.tokens, self.covered, self.written, self.kl = 0, 0, 0, 0.0
        # greedy and drawn
        self.kept = torch.zeros(drafts, 2, dtype=torch.float64)
        self.tested = torch.zeros(drafts, dtype=torch.float64)
        self.steps = torch.zeros(drafts, 2, dtype=torch.float64)

    def add_steps(self, mask: Tensor, positions: Tensor, chances: Sequence[Tensor]) -> None:
        """Add a batch; mask and positions [B, T], chances of both kinds [S, B, T].

        A model that drafts alike anywhere in a step has them once, S is 1.
        """
        drafts = len(self.tested)
        rates = [each.expand(drafts, -1, -1) if len(each) == 1 else each for each in chances]
        for number in range(drafts):
            # a step of so many drafts does not begin before the document
            valid = mask & (positions >= number)
            self.tested[number] += int(valid.sum())
            self.kept[number] += torch.stack([each[number][valid].sum() for each in rates]).cpu()
        # a text ends where nothing is learned, or another document begins
        begins = mask & ~(mask.roll(1, 1) & (positions == positions.roll(1, 1) + 1))
        for row, own in enumerate(mask):
            numbers = own.nonzero()[:, 0]
            starts = begins[row][numbers].nonzero()[:, 0].tolist()
            for start, end in zip(starts, [*starts[1:], len(numbers)], strict=True):
                # the first token comes with the prompt
                text = numbers[start + 1 : end]
                self.written += len(text)
                for kind, each in enumerate(rates):
                    given = each[:, row, text].tolist()
                    for count in range(1, drafts + 1):
                        self.steps[count - 1, kind] += steps_of(given, count)

    def rows(self) -> list[JsonObject]:
        """For each number of drafts: shares of the last one kept, and tokens of a step."""
        kept = self.kept / self.tested.clamp(min=1)[:, None]
        tokens = self.written / self.steps.clamp(min=1)
        return [
            {
                DRAFTED_TOKENS.name: number,
                AGREEMENT.name: equal,
                ACCEPTANCE.name: shared,
                STEP_TOKENS.name: greedy,
                f"sampled_{STEP_TOKENS.name}": drawn,
            }
            for number, ((equal, shared), (greedy, drawn)) in enumerate(
                zip(kept.tolist(), tokens.tolist(), strict=True), 1
            )
        ]


def steps_of(chances: Sequence[Sequence[float]], drafts: int) -> float:
    """Expected steps of so many drafts that write a text.

    `chances[n][t]` is that of token t to be kept as draft n of a step.
    """
    length = len(chances[0])
    # chance that a step begins at each token, and behind the last
    begun = [1.0] + [0.0] * length
    for token in range(length):
        alive = begun[token]
        for number in range(min(drafts, length - token)):
            kept = chances[number][token + number]
            begun[token + number + 1] += alive * (1 - kept)
            alive *= kept
        begun[min(token + drafts + 1, length)] += alive
    return sum(begun[:length])


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
            "raise --vocabulary, or let more text be counted (more steps, or fewer --answer-uses)"
        )
