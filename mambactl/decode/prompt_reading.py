"""Reading prompts a piece at a time, so that what is being written goes on between the pieces."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Protocol

import torch
from torch import Tensor

from mambactl.decode.head_drafter import HeadReading
from mambactl.decode.prefill import piece_by_piece
from mambactl.models.cache import HybridCache
from mambactl.models.draft_head import DraftHead, DraftModel
from mambactl.models.hybrid import HybridForCausalLM, HybridModel
from mambactl.present import present


@dataclass(frozen=True)
class ReadPrompt:
    """A prompt that was read: what the models hold after it, one row, not to be written to.

    A draft model has read all but the last token, which it reads with the first new one; a head
    has read all. `hidden` is the target's stream behind the last token.
    """

    tokens: list[int]
    target: HybridCache
    draft: HybridCache | None
    hidden: Tensor  # [1, D]

    def nbytes(self) -> int:
        """Bytes that it takes."""
        return _nbytes(self.target, self.draft)


@dataclass(frozen=True)
class ReadRows:
    """Prompts that were read together, a row each; otherwise as `ReadPrompt`.

    A draft has yet to read the last `unread` tokens of each. Caches with a `loan` may have more
    rows, and hold these until the next prompts are read.
    """

    prompts: list[list[int]]
    target: HybridCache
    draft: HybridCache | None
    hidden: Tensor  # [B, D]
    unread: int = 1

    @classmethod
    def of(cls, prompt: ReadPrompt) -> "ReadRows":
        """A batch of one prompt."""
        return cls([prompt.tokens], prompt.target, prompt.draft, prompt.hidden)

    def nbytes(self) -> int:
        """Bytes that all rows take."""
        return _nbytes(self.target, self.draft)

    def own(self) -> "ReadRows":
        """The same rows in memory of their own."""
        if all(cache is None or cache.loan is None for cache in (self.target, self.draft)):
            return self
        return self._picked(range(len(self.prompts)))

    def select(self, rows: Sequence[int]) -> "ReadRows":
        """Some of the rows (repeats allowed); these stay as they are."""
        return self if list(rows) == list(range(len(self.prompts))) else self._picked(rows)

    def _picked(self, rows: Sequence[int]) -> "ReadRows":
        index = torch.tensor(list(rows), dtype=torch.long, device=self.hidden.device)
        draft = self.draft and self.draft.select(index)
        prompts = [self.prompts[row] for row in rows]
        return replace(
            self,
            prompts=prompts,
            target=self.target.select(index),
            draft=draft,
            hidden=self.hidden[index],
        )

    def prompt(self, row: int) -> ReadPrompt:
        """One of the rows, without the memory of the others."""
        tokens = self.prompts[row]
        target = present(self._alone(self.target, row, len(tokens)))
        draft = self._alone(self.draft, row, len(tokens) - self.unread)
        return ReadPrompt(tokens, target, draft, self.hidden[row : row + 1])

    def _alone(self, cache: HybridCache | None, row: int, length: int) -> HybridCache | None:
        if cache is None:
            return None
        own = cache
        if len(self.prompts) > 1 or cache.loan is not None:
            own = cache.select(torch.tensor([row], device=self.hidden.device))
        own.seen = length
        for layer in own.layers:
            layer.resize(length)
            # what was cut off would be kept in memory
            layer.replace_tensors(Tensor.contiguous)
        return own


class ReadsWhole(Protocol):
    """Protocol of what reads prompts at once from their first tokens on (`WholePrompts`)."""

    def length(self, prompts: Sequence[Sequence[int]], most: int) -> int | None:
        """Padded length for these prompts of at most `most` tokens; None if it cannot read them."""
        ...

    def read(self, prompts: Sequence[Sequence[int]], length: int) -> tuple[HybridCache, Tensor]:
        """Cache of the prompts, lent or their own, and the stream [B, D] behind their last tokens.

        One with a `loan` may have more rows.
        """
        ...


# of the target, and of a draft model
Whole = tuple[ReadsWhole, ReadsWhole | None]


class PromptReading:
    """Several prompts being read together, on from a beginning that all have in common.

    Each is longer than the beginning by a token at least.
    """

    def __init__(
        self,
        target: HybridForCausalLM,
        draft: DraftModel,
        prompts: Sequence[Sequence[int]],
        start: ReadPrompt | None,
        piece: int,
        whole: Whole | None = None,
    ):
        """Prepare to read `prompts` on from `start`, `piece` tokens of all of them at once.

        Without a `start`, prompts of no more tokens are read by `whole`.
        """
        self.prompts = [list(prompt) for prompt in prompts]
        self.known = 0 if start is None else len(start.tokens)
        self._hidden: Tensor | None = None
        at_once = None
        if whole is not None and start is None and not isinstance(draft, DraftHead):
            at_once = whole[0].length(self.prompts, piece)
        if whole is not None and at_once is not None:
            self._unread = 1
            self._target = _cache(target.model, None, 0)
            self._draft = None
            self._pieces = self._at_once(whole, draft, at_once)
            return
        rest = [prompt[self.known :] for prompt in self.prompts]
        size = max(piece // len(rest), 1)
        self._target = _cache(target.model, start and start.target, len(rest))
        self._draft: HybridCache | None = None
        # tokens of a prompt that a draft reads later
        self._unread = 1
        along = None
        if isinstance(draft, DraftHead):
            along = HeadReading.start(draft, len(rest))
            if start is not None:
                along.cache = _cache(draft.body.model, start.draft, len(rest))
                along.cache.level = True
                along.before = start.hidden.expand(len(rest), -1)
            self._draft, self._unread = along.cache, 0
        pieces = piece_by_piece(target.model, self._target, rest, size, along)
        if isinstance(draft, HybridForCausalLM):
            # the last token of the beginning it has yet to read
            last, known = draft.config.vocab_size - 1, max(self.known - 1, 0)
            own = [[min(t, last) for t in prompt[known:-1]] for prompt in self.prompts]
            self._draft = _cache(draft.model, start and start.draft, len(rest))
            pieces = chain(piece_by_piece(draft.model, self._draft, own, size), pieces)
        self._pieces = pieces

    def _at_once(self, whole: Whole, draft: DraftModel, length: int) -> Iterator[Tensor]:
        """Read all prompts, padded to `length`, as one piece."""
        target, other = whole
        if isinstance(draft, HybridForCausalLM) and other is not None:
            last = draft.config.vocab_size - 1
            own = [[min(t, last) for t in prompt[:-1]] for prompt in self.prompts]
            self._draft, _ = other.read(own, length)
        self._target, hidden = target.read(self.prompts, length)
        yield hidden

    @torch.no_grad()
    def read(self) -> bool:
        """Read a piece; True when it was the last one."""
        self._hidden = next(self._pieces)
        # the target comes after the draft
        return self._target.seen >= max(map(len, self.prompts))

    def rows(self) -> ReadRows:
        """All prompts, which were read."""
        return ReadRows(
            self.prompts, self._target, self._draft, present(self._hidden), self._unread
        )


def _nbytes(*caches: HybridCache | None) -> int:
    return sum(cache.nbytes() for cache in caches if cache is not None)


def _cache(model: HybridModel, start: HybridCache | None, rows: int) -> HybridCache:
    """Cache of `rows` rows, each with the content of `start`, from which reading goes on."""
    if start is None:
        return HybridCache(model.config, rows, model.device)
    return start.select(torch.zeros(rows, dtype=torch.long, device=model.device))
