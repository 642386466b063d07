"""Drafts of a head that reads the target's own stream, in the reference engine.

After a step the head reads the tokens that were accepted with the target's streams before them,
and then, token by token, its own stream in place of the target's. What it wrote for those guesses
is taken back before the next step: rejected drafts leave no trace.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mambactl.decode.accept import Proposal, Verdict
from mambactl.decode.drafters import draft_token
from mambactl.decode.prefill import newest
from mambactl.decode.sampler import Sampler
from mambactl.models.cache import HybridCache
from mambactl.models.draft_head import DraftHead, shifted


class HeadReading:
    """A head that reads prompts along with its target, piece by piece; see `prefill.Along`.

    `before` [B, D] is the target's stream behind the last token so far, 0 before the first.
    """

    def __init__(self, head: DraftHead, cache: HybridCache, before: Tensor):
        self.head, self.cache, self.before = head, cache, before

    @classmethod
    def start(cls, head: DraftHead, rows: int) -> "HeadReading":
        """Begin with rows that hold no token."""
        cache = HybridCache(head.config, rows, head.device)
        # as the target's, whose rows stand level until all prompts are read
        cache.level = True
        before = head.fc.weight.new_zeros(rows, head.config.hidden_size)
        return cls(head, cache, before)

    def __call__(self, tokens: Tensor, streams: Tensor, n_new: Tensor | None) -> None:
        """Read tokens [B, T] with the target's streams behind them [B, T, D]."""
        self.head.read(shifted(streams, self.before), tokens, self.cache, n_new)
        self.before = newest(streams, n_new, self.before)


class HeadDrafter:
    """Drafts with a head of the target; see `Drafter` and `HeadReading`."""

    def __init__(self, head: DraftHead):
        self.head = head
        self.vocab_size = head.config.vocab_size
        # of rows whose prompts were read before
        self.reading: HeadReading | None = None

    def converse(self) -> None:
        """Do nothing: the head reads every prompt whole, along with its target."""

    def along(self, rows: int) -> HeadReading:
        """Begin to read the prompts of a batch along with the target."""
        self.reading = HeadReading.start(self.head, rows)
        return self.reading

    def start(self, prompts: Sequence[Sequence[int]], sampler: Sampler) -> None:
        """Take over what was read; the last token of each prompt is pending."""
        if self.reading is None:
            raise ValueError("a head drafts behind prompts that it has read along")
        self.sampler, self.cache = sampler, self.reading.cache
        self.cache.recording = True
        self.cache.level = False
        last = [[prompt[-1]] for prompt in prompts]
        self.backlog = torch.tensor(last, device=self.head.device)  # [B, 1]
        self.streams = self.reading.before[:, None]  # [B, 1, D]
        self.behind = torch.ones_like(self.backlog[:, 0])  # [B], unread tokens in backlog
        self.reading = None

    def propose(self, limits: list[int], positions: Tensor) -> Proposal:
        """Draft one token per pass; rows that reached their limit wait."""
        lengths = torch.tensor(limits, device=self.head.device)  # [B]
        tokens: list[Tensor] = []
        probs: list[Tensor] = []
        streams, feed, n_new = self.streams, self.backlog, self.behind
        own = self.head.fc.weight.new_zeros(len(limits), self.head.config.hidden_size)  # [B, D]
        for index in range(max(limits)):
            stream = self.head.read(streams, feed, self.cache, n_new)  # [B, T, D]
            own = newest(stream, n_new, own)
            if index == 0:
                self.known = self.cache.lengths.clone()  # [B], everything certain is read
            logits = self.head.logits(own)  # [B, V]
            token, distribution = draft_token(self.sampler, logits, positions + index)
            if distribution is not None:
                probs.append(distribution)
            tokens.append(token)
            streams, feed = own[:, None], token[:, None]
            n_new = (lengths > index + 1).long()
        stacked = torch.stack(probs, 1) if probs else None  # [B, K, V]
        return Proposal(torch.stack(tokens, 1), lengths, stacked)

    def follow(self, proposal: Proposal) -> None:
        """Read what was accepted, and nothing of a proposal that is not its own."""
        self.head.read(self.streams, self.backlog, self.cache, self.behind)
        self.known = self.cache.lengths.clone()  # [B]

    def see(self, streams: Tensor) -> None:
        """Take note of the target's streams [B, K + 1, D] behind the tokens just verified."""
        self.streams = streams

    def commit(self, proposal: Proposal, verdict: Verdict) -> None:
        """Forget every guess; remember the tokens to be read with the target's streams."""
        self.cache.rollback(self.known)
        following = verdict.following[:, None]  # [B, 1]
        taken = torch.cat([proposal.tokens, following], 1)  # [B, K + 1]
        self.backlog = taken.scatter(1, verdict.accepted[:, None], following)
        self.behind = verdict.accepted + 1

    def keep(self, rows: Tensor) -> None:
        """Drop every row but `rows` [R], in that order."""
        if self.reading is not None:
            self.reading.cache.reorder(rows)
            self.reading.before = self.reading.before[rows]
            return
        self.cache.reorder(rows)
        self.backlog, self.behind = self.backlog[rows], self.behind[rows]
        self.streams = self.streams[rows]
