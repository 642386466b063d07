"""Sources of drafted tokens: a smaller model, or earlier occurrences in the text itself."""

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from mambactl.decode.accept import Proposal, Verdict
from mambactl.decode.conversation import Conversation
from mambactl.decode.prefill import pad, prefill
from mambactl.decode.sampler import Sampler, Stream, draw
from mambactl.models.cache import HybridCache
from mambactl.models.hybrid import HybridForCausalLM


class Drafter(Protocol):
    """Proposes tokens for a running batch and is told which of them survived.

    `vocab_size` is None when a drafter only repeats tokens it has seen.
    """

    @property
    def vocab_size(self) -> int | None: ...

    def start(self, prompts: Sequence[Sequence[int]], sampler: Sampler) -> None:
        """Begin a batch with whole prompts (last token included)."""

    def propose(self, limits: list[int], positions: Tensor) -> Proposal:
        """Draft at most `limits[b]` tokens; positions [B] number the first of them."""
        ...

    def follow(self, proposal: Proposal) -> None:
        """Read along with tokens that were proposed in place of a draft's own."""

    def commit(self, proposal: Proposal, verdict: Verdict) -> None:
        """Take over what the target decided about the last proposal."""

    def keep(self, rows: Tensor) -> None:
        """Drop every row but `rows` [R], in that order."""

    def converse(self) -> None:
        """Treat later batches as the prompts of one conversation, one prompt each."""


class ModelDrafter:
    """Drafts with a second model and its own cache, rolled back like the target's.

    A proposal of n tokens puts only the first n - 1 into the cache, because nobody asks what
    follows the last one. When all n survive, the next first pass therefore reads two tokens.
    """

    def __init__(self, model: HybridForCausalLM, vocab_size: int | None = None):
        """Draft with `model`; `vocab_size` is the target's when the two differ by padding only."""
        self.model = model
        self.own_size = model.config.vocab_size
        self.vocab_size = vocab_size or self.own_size
        self.conversation: Conversation | None = None
        # what has read the beginning of the next prompts
        self.prefix: HybridCache | None = None

    def converse(self) -> None:
        """Treat later prompts as one conversation, in which each is read from the last one on."""
        self.conversation = Conversation(self.model.model)

    def start(self, prompts: Sequence[Sequence[int]], sampler: Sampler) -> None:
        """Read all but the last token of each prompt."""
        self.sampler, self.cache = sampler, self._read([prompt[:-1] for prompt in prompts])
        self.backlog = pad([[prompt[-1]] for prompt in prompts], self.model.device)  # [B, 1]
        self.behind = torch.ones_like(self.backlog[:, 0])  # [B], unread tokens in backlog

    def propose(self, limits: list[int], positions: Tensor) -> Proposal:
        """Draft one token per pass; rows that reached their limit wait."""
        lengths = torch.tensor(limits, device=self.model.device)  # [B]
        tokens: list[Tensor] = []
        probs: list[Tensor] = []
        feed, n_new = self.backlog, self.behind
        for index in range(max(limits)):
            logits = self._last_logits(feed, n_new)  # [B, V]
            if index == 0:
                self.known = self.cache.lengths.clone()  # [B], everything certain is read
            token, distribution = draft_token(self.sampler, logits, positions + index)
            if distribution is not None:
                probs.append(distribution)
            tokens.append(token)
            feed, n_new = token[:, None], (lengths > index + 1).long()
        stacked = torch.stack(probs, 1) if probs else None  # [B, K, V]
        return Proposal(torch.stack(tokens, 1), lengths, stacked)

    def follow(self, proposal: Proposal) -> None:
        """Read what a proposal of its own puts into the cache: all but the last token."""
        self._stream(self.backlog, self.behind)
        self.known = self.cache.lengths.clone()  # [B]
        if proposal.tokens.shape[1] > 1:
            self._stream(proposal.tokens[:, :-1], (proposal.lengths - 1).clamp(min=0))

    def commit(self, proposal: Proposal, verdict: Verdict) -> None:
        """Forget rejected tokens; remember the ones not read yet."""
        read = torch.minimum(verdict.accepted, (proposal.lengths - 1).clamp(min=0))  # [B]
        self.cache.rollback(self.known + read)
        unread = verdict.accepted > read  # [B], the last drafted token survived
        last = proposal.tokens.gather(1, (verdict.accepted - 1).clamp(min=0)[:, None])  # [B, 1]
        following = verdict.following[:, None]  # [B, 1]
        self.backlog = torch.cat(
            [torch.where(unread[:, None], last, following), following], 1
        )  # [B, 2]
        self.behind = 1 + unread.long()

    def keep(self, rows: Tensor) -> None:
        """Drop every row but `rows` [R], in that order."""
        self.cache.reorder(rows)
        self.backlog, self.behind = self.backlog[rows], self.behind[rows]

    def _last_logits(self, tokens: Tensor, n_new: Tensor) -> Tensor:
        """Read n_new [B] of tokens [B, T]; logits after the last of them, [B, V] of the target."""
        hidden = self._stream(tokens, n_new)  # [B, T, D]
        rows = torch.arange(len(tokens), device=tokens.device)
        logits = self.model.lm_head(hidden[rows, (n_new - 1).clamp(min=0)])  # [B, own V]
        if self.own_size >= self.vocab_size:
            return logits[:, : self.vocab_size]
        return F.pad(logits, (0, self.vocab_size - self.own_size), value=float("-inf"))

    def _stream(self, tokens: Tensor, n_new: Tensor) -> Tensor:
        """Read n_new [B] of tokens [B, T]; the last stream behind each, [B, T, D]."""
        return self.model.model(
            input_ids=tokens.clamp(max=self.own_size - 1),
            past_key_values=self.cache,
            n_new=n_new,
            use_cache=True,
        ).last_hidden_state

    def _read(self, prompts: Sequence[Sequence[int]]) -> HybridCache:
        known = [[min(token, self.own_size - 1) for token in prompt] for prompt in prompts]
        prefix = self.prefix if self.conversation is None else self.conversation.of(known)
        return prefill(self.model, known, recording=True, prefix=prefix)[0]


def draft_token(
    sampler: Sampler, logits: Tensor, positions: Tensor
) -> tuple[Tensor, Tensor | None]:
    """A token [B] by logits [B, V] for text positions [B], and what it was drawn from [B, V].

    A greedy one was not drawn: None.
    """
    if sampler.params.greedy:
        return logits.argmax(-1), None
    distribution = sampler.probs(logits)  # [B, V]
    return draw(distribution, sampler.uniform(positions, Stream.PROPOSE)), distribution


class NgramDrafter:
    """Prompt lookup: continue as the text did after the latest earlier match of its last tokens.

    Tries the longest suffix first, `longest` down to one token. A row without a match drafts
    nothing in that step.
    """

    vocab_size = None

    def __init__(self, longest: int = 3):
        self.longest = longest

    def converse(self) -> None:
        """Do nothing: a text is indexed faster than it is compared."""

    def start(self, prompts: Sequence[Sequence[int]], sampler: Sampler) -> None:
        """Index every prompt."""
        self.device = sampler.keys.device
        self.texts: list[list[int]] = [[] for _ in prompts]
        self.follows: list[dict[tuple[int, ...], int]] = [{} for _ in prompts]
        for row, prompt in enumerate(prompts):
            self._extend(row, prompt)

    def propose(self, limits: list[int], positions: Tensor) -> Proposal:
        """Copy what followed the match."""
        drafts = [self._lookup(row, limit) for row, limit in enumerate(limits)]
        lengths = torch.tensor([len(draft) for draft in drafts], device=self.device)
        return Proposal(pad(drafts, self.device), lengths)

    def follow(self, proposal: Proposal) -> None:
        """Do nothing: a text is indexed when it is committed."""

    def commit(self, proposal: Proposal, verdict: Verdict) -> None:
        """Append what the target kept and chose."""
        tokens, following = proposal.tokens.tolist(), verdict.following.tolist()
        for row, accepted in enumerate(verdict.accepted.tolist()):
            self._extend(row, [*tokens[row][:accepted], following[row]])

    def keep(self, rows: Tensor) -> None:
        """Drop every row but `rows` [R], in that order."""
        self.texts = [self.texts[row] for row in rows.tolist()]
        self.follows = [self.follows[row] for row in rows.tolist()]

    def _extend(self, row: int, tokens: Sequence[int]) -> None:
        """Index each n-gram at the moment a token follows it, so the suffix never finds itself."""
        text, follows = self.texts[row], self.follows[row]
        for token in tokens:
            for size in range(1, min(self.longest, len(text)) + 1):
                follows[tuple(text[-size:])] = len(text)
            text.append(token)

    def _lookup(self, row: int, limit: int) -> list[int]:
        text, follows = self.texts[row], self.follows[row]
        for size in range(min(self.longest, len(text)), 0, -1):
            start = follows.get(tuple(text[-size:]))
            if start is not None:
                return text[start : start + limit]
        return []
