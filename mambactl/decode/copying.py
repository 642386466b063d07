"""Choice between the tokens of a draft and those that followed the same words before.

Where a text repeats itself, n-grams give for nothing what a draft takes passes for. Elsewhere
matches of five tokens are rare enough to lose next to nothing (`recipes/results/decode-log.md`).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch

from mambactl.decode.accept import Proposal, Verdict
from mambactl.decode.draft_count import VERIFIED_TOKEN
from mambactl.decode.prefill import pad
from mambactl.models.draft_head import DraftHead, DraftModel
from mambactl.models.hybrid import HybridForCausalLM

# tokens that have to occur before in the same order, beside a draft and without one
MATCH, MATCH_ALONE = 5, 3
# what is believed of copied and of drafted tokens at first: share accepted, as if tested so often
COPIED_PRIOR, COPIED_TESTS = 0.5, 4.0
DRAFTED_PRIOR, DRAFTED_TESTS = 0.7, 12.0
# half as much counts a test after so many others
COPIED_HALF_LIFE, DRAFTED_HALF_LIFE = 64.0, 256.0


def weight_share(draft: DraftModel | str, target: HybridForCausalLM) -> float:
    """Weights read for a draft token over those of a pass of the target; n-grams read none."""
    if isinstance(draft, DraftHead):
        own = _weights_read(draft.body) + draft.fc.weight.numel()
    elif isinstance(draft, HybridForCausalLM):
        own = _weights_read(draft)
    else:
        return 0.0
    return own / _weights_read(target)


def _weights_read(model: HybridForCausalLM) -> int:
    """Parameters that a step reads: all but the embedding table, where it is not the head too."""
    table, head = model.model.embed_tokens.weight, model.lm_head.weight
    every = sum(parameter.numel() for parameter in model.parameters())
    return every if head is table else every - table.numel()


class Rate:
    """Chance that a tested token is accepted, in which older tests fade."""

    def __init__(self, prior: float, tests: float, half_life: float):
        self.passed, self.tested, self.half_life = prior * tests, tests, half_life

    def observe(self, drafted: int, accepted: int) -> None:
        """Take note of `accepted` of `drafted` tokens; a rejected one was tested too."""
        tested = min(accepted + 1, drafted)
        fade = 0.5 ** (tested / self.half_life)
        self.passed = self.passed * fade + accepted
        self.tested = self.tested * fade + tested

    def tokens(self, k: int) -> float:
        """Expected tokens of a step with k of them."""
        chance = min(self.passed / self.tested, 0.999)
        return (1 - chance ** (k + 1)) / (1 - chance)


@dataclass
class _Text:
    """Tokens of a row, and where what followed each run of MATCH of them began."""

    tokens: list[int] = field(default_factory=list)
    follows: dict[tuple[int, ...], int] = field(default_factory=dict)

    def add(self, token: int) -> None:
        """Append a token, which is what follows the tokens before it."""
        if len(self.tokens) >= MATCH:
            self.follows[tuple(self.tokens[-MATCH:])] = len(self.tokens)
        self.tokens.append(token)

    def next(self) -> int | None:
        """Index of what followed the last tokens before; None if they are new."""
        return self.follows.get(tuple(self.tokens[-MATCH:]))


class Copying:
    """Decision whether the next step of a batch takes its drafts from the text itself.

    It costs one pass of the draft, which reads along, where k drafts cost k. What a copied token
    would have been worth is known at every match, taken or not. Costs are those of weights that
    are read, whatever the clock says, so that the same seed gives the same text. `share` is a
    draft token's share of the target's weights, `most` the number of tokens copied.
    """

    def __init__(self, share: float, most: int):
        self.share, self.most = share, most
        self.copied = Rate(COPIED_PRIOR, COPIED_TESTS, COPIED_HALF_LIFE)
        self.drafted = Rate(DRAFTED_PRIOR, DRAFTED_TESTS, DRAFTED_HALF_LIFE)
        self.texts: list[_Text] = []

    def start(self, prompts: Sequence[Sequence[int]]) -> None:
        """Begin with whole prompts."""
        self.texts = [_Text() for _ in prompts]
        for text, prompt in zip(self.texts, prompts, strict=True):
            for token in prompt:
                text.add(token)

    def add(self, row: int, tokens: Sequence[int]) -> None:
        """Append new tokens of a row, and see which of them its text predicted."""
        text = self.texts[row]
        for token in tokens:
            at = text.next()
            if at is not None:
                self.copied.observe(1, int(text.tokens[at] == token))
            text.add(token)

    def propose(self, rows: Sequence[int], limits: Sequence[int], device: torch.device) -> Proposal:
        """Copy at most `limits[b]` tokens for row `rows[b]`, none where its last ones are new."""
        found = [self.copies(row, limit) for row, limit in zip(rows, limits, strict=True)]
        lengths = torch.tensor([len(tokens) for tokens in found], device=device)  # [B]
        return Proposal(pad(found, device), lengths)

    def observe(
        self, rows: Sequence[int], proposal: Proposal, verdict: Verdict, copied: bool
    ) -> None:
        """Take note of a step: its new tokens, and what of a draft's was accepted."""
        tokens, following = proposal.tokens.tolist(), verdict.following.tolist()
        drafted, accepted = proposal.lengths.tolist(), verdict.accepted.tolist()
        for index, row in enumerate(rows):
            kept = accepted[index]
            if not copied and drafted[index]:
                self.drafted.observe(drafted[index], kept)
            self.add(row, [*tokens[index][:kept], following[index]])

    def copies(self, row: int, limit: int) -> list[int]:
        """Tokens that followed the last ones of a row before, at most `limit`."""
        text = self.texts[row]
        at = text.next()
        return [] if at is None else text.tokens[at : at + limit]

    def due(self, rows: Iterable[int], k: int) -> bool:
        """True if copying promises more for these rows than k drafts."""
        matches = [self.texts[row].next() is not None for row in rows]
        if not k or not any(matches):
            return False
        found = sum(matches) / len(matches)
        copied = 1 + found * (self.copied.tokens(self.most) - 1)
        spent = 1 + self.share + self.most * VERIFIED_TOKEN
        return copied / spent > self.drafted.tokens(k) / (1 + k * (self.share + VERIFIED_TOKEN))
