"""Draft, verify, accept, roll back: the reference decoding loop in plain PyTorch.

Reading the prompts gives each row its first token. From then on the target holds every token of a
row except the last, which is pending. A step runs
[pending, d_1 .. d_n] through the target, keeps the accepted prefix and makes the corrected or
bonus token the next pending one. Plain decoding is the same loop with n = 0.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from mambactl.decode.accept import Proposal, Verdict, accept_greedy, accept_sampled
from mambactl.decode.conversation import Conversation
from mambactl.decode.copying import Copying
from mambactl.decode.drafters import Drafter
from mambactl.decode.head_drafter import HeadDrafter
from mambactl.decode.prefill import prefill
from mambactl.decode.prefix_files import PrefixFolder
from mambactl.decode.sampler import Sampler, SamplingParams, Stream
from mambactl.decode.shared_prefix import Prefixes
from mambactl.decode.stats import DecodeStats
from mambactl.errors import ModelError, UsageError
from mambactl.models.cache import HybridCache
from mambactl.models.hybrid import HybridForCausalLM

Finish = Literal["eos", "length", "stop"]
# row and its new tokens; True ends the row
OnTokens = Callable[[int, list[int]], bool | None]


@dataclass
class Generation:
    """New tokens and the reason each row ended, in the order of the prompts.

    An eos token is part of its row's tokens.
    """

    tokens: list[list[int]]
    finish: list[Finish]
    stats: DecodeStats = field(default_factory=DecodeStats)


def check_prompts(prompts: Sequence[Sequence[int]], vocabulary: int) -> None:
    """Raise UsageError for a prompt without a token, or with one that the model does not know."""
    for row, prompt in enumerate(prompts):
        if not prompt:
            raise UsageError(f"prompt {row} is empty", hint="a prompt needs at least one token")
        if not 0 <= min(prompt) <= max(prompt) < vocabulary:
            raise UsageError(
                f"prompt {row} holds tokens from {min(prompt)} to {max(prompt)}, but the model's "
                f"vocabulary ends at {vocabulary - 1}",
                hint="use the tokenizer that belongs to the model",
            )


@dataclass
class RunningBatch:
    """The unfinished rows: `rows[b]` is the prompt that batch row b continues."""

    rows: list[int]
    cache: HybridCache
    pending: Tensor  # [B]
    sampler: Sampler
    # behind each token of the last pass
    logits: Tensor  # [B, T, V]

    def keep(self, survivors: list[int]) -> Tensor:
        """Drop every row but the survivors; returns their indices as a tensor."""
        index = torch.tensor(survivors, dtype=torch.long, device=self.pending.device)
        self.rows = [self.rows[row] for row in survivors]
        self.cache.reorder(index)
        self.pending = self.pending[index]
        self.sampler.keep(index)
        return index


class Engine:
    """Decodes with `target`, helped by `drafter` with up to k tokens per step (k = 0: plain)."""

    def __init__(
        self,
        target: HybridForCausalLM,
        drafter: Drafter | None = None,
        k: int = 0,
        share: bool = True,
        folder: PrefixFolder | None = None,
        copying: Copying | None = None,
    ):
        if (drafter is None) != (k == 0):
            raise ValueError("a drafter needs k >= 1, and k >= 1 needs a drafter")
        vocabulary = target.config.vocab_size
        if drafter is not None and drafter.vocab_size not in (None, vocabulary):
            raise ModelError(
                f"draft and target have different vocabularies: {drafter.vocab_size} and "
                f"{vocabulary} tokens",
                hint="take a draft of the target's family, or `--draft ngram`",
            )
        self.target, self.drafter, self.k = target, drafter, k
        self.copying = copying
        # a head reads along from the first token on: what was read without it is of no use
        self.along = drafter.along if isinstance(drafter, HeadDrafter) else None
        alone = self.along is None
        self.prefixes = Prefixes(target.model, share and alone, folder if alone else None)

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        on_tokens: OnTokens | None = None,
        keys: Sequence[int] | None = None,
    ) -> Generation:
        """Continue every prompt; `keys` [B] name the rows for sampling (default 0, 1, ...).

        `on_tokens(row, tokens)` is called with the new tokens of each step; where it returns True
        the row is finished.
        """
        check_prompts(prompts, self.target.config.vocab_size)
        output = Generation([[] for _ in prompts], ["length" for _ in prompts])
        stats = output.stats
        stats.rows, stats.prompt_tokens = len(prompts), sum(map(len, prompts))
        sampler = Sampler(params, keys or range(len(prompts)), self.target.device)
        with stats.timed("prefill", self.target.device), self.prefixes.counted(stats):
            batch = self._start(prompts, sampler)
        stats.at_once = len(prompts)
        self.hand_over(batch, prompts, output, on_tokens)
        while batch.rows:
            self.advance(batch, output, on_tokens)
        stats.tokens = sum(map(len, output.tokens))
        self.prefixes.ended(prompts, output.tokens, batch.cache)
        return output

    def converse(self) -> Conversation:
        """Treat later prompts as one conversation, in which each is read from the last one on."""
        conversation = Conversation(self.target.model)
        if self.along is None:
            self.prefixes = conversation
        if self.drafter is not None:
            self.drafter.converse()
        return conversation

    def _start(self, prompts: Sequence[Sequence[int]], sampler: Sampler) -> RunningBatch:
        """Read the prompts and choose the first token of each, which is pending then."""
        prefix = self.prefixes.of(prompts)
        along = None if self.along is None else self.along(len(prompts))
        cache, hidden = prefill(self.target, prompts, self.k > 0, prefix, along)
        return self.begin(cache, hidden, sampler)

    @torch.no_grad()
    def begin(self, cache: HybridCache, hidden: Tensor, sampler: Sampler) -> RunningBatch:
        """Choose the first token of each row by hidden [B, D] behind the prompts in a cache."""
        logits = self.target.lm_head(hidden)[:, None]  # [B, 1, V]
        nothing = logits.new_zeros(len(hidden), 0, dtype=torch.long)  # [B, 0]
        proposal = Proposal(nothing, nothing.sum(1))
        rows = list(range(len(hidden)))
        verdict = self._judge(sampler, logits, proposal, [0] * len(rows))
        return RunningBatch(rows, cache, verdict.following, sampler, logits)

    @torch.no_grad()
    def hand_over(
        self,
        batch: RunningBatch,
        prompts: Sequence[Sequence[int]],
        output: Generation,
        on_tokens: OnTokens | None,
    ) -> None:
        """Emit the first tokens, drop the rows that end with them, start the drafter."""
        first = [[token] for token in batch.pending.tolist()]
        params = batch.sampler.params
        survivors = [row for row in batch.rows if _emit(row, first[row], params, output, on_tokens)]
        if len(survivors) < len(batch.rows):
            index = batch.keep(survivors)
            if isinstance(self.drafter, HeadDrafter):
                self.drafter.keep(index)
        if self.copying is not None:
            texts = [[*prompt, *new] for prompt, new in zip(prompts, first, strict=True)]
            self.copying.start(texts)
        if self.drafter is not None and survivors:
            with output.stats.timed("prefill", self.target.device):
                self.drafter.start([[*prompts[r], *first[r]] for r in survivors], batch.sampler)

    @torch.no_grad()
    def advance(self, batch: RunningBatch, output: Generation, on_tokens: OnTokens | None) -> None:
        """Advance every unfinished row by at least one token and drop the finished ones."""
        stats, device = output.stats, self.target.device
        written = [len(output.tokens[row]) for row in batch.rows]
        copied = self.copying is not None and self.copying.due(batch.rows, self.k)
        with stats.timed("draft", device):
            proposal = self._propose(batch, written, copied)
        with stats.timed("verify", device):
            verdict = self._verify(batch, proposal, written)
        accepted = verdict.accepted.tolist()
        stats.count_step(proposal.lengths.tolist(), accepted)
        drafted, following = proposal.tokens.tolist(), verdict.following.tolist()
        survivors = []
        if self.copying is not None:
            self.copying.observe(batch.rows, proposal, verdict, copied)
        for index, row in enumerate(batch.rows):
            new = [*drafted[index][: accepted[index]], following[index]]
            if _emit(row, new, batch.sampler.params, output, on_tokens):
                survivors.append(index)
        if not survivors:
            batch.rows = []
            return
        with stats.timed("draft", device):
            self._continue(batch, survivors, proposal, verdict)

    def _continue(
        self, batch: RunningBatch, survivors: list[int], proposal: Proposal, verdict: Verdict
    ) -> None:
        """Tell the drafter what became of its tokens and shrink the batch to its survivors."""
        if self.drafter is not None:
            self.drafter.commit(proposal, verdict)
        if len(survivors) == len(batch.rows):
            return
        index = batch.keep(survivors)
        if self.drafter is not None:
            self.drafter.keep(index)

    def _propose(self, batch: RunningBatch, written: list[int], copied: bool) -> Proposal:
        """Ask for k tokens per row, fewer where the budget ends: a step adds one of its own."""
        budget = batch.sampler.params.max_new_tokens
        limits = [min(self.k, budget - count - 1) for count in written]
        if self.drafter is not None and self.copying is not None and copied and max(limits) > 0:
            proposal = self.copying.propose(batch.rows, limits, batch.pending.device)
            if proposal.tokens.shape[1] > 0:
                self.drafter.follow(proposal)
                return proposal
        if self.drafter is not None and max(limits) > 0:
            positions = torch.tensor(written, device=batch.pending.device)  # [B]
            return self.drafter.propose(limits, positions)
        # without a budget for drafts every row ends with this step, so no drafter misses it
        nothing = batch.pending.new_zeros(len(limits), 0)  # [B, 0]
        return Proposal(nothing, batch.pending.new_zeros(len(limits)))

    def _verify(self, batch: RunningBatch, proposal: Proposal, written: list[int]) -> Verdict:
        """One target pass over [pending, drafts]; the cache ends at the last accepted token."""
        held = batch.cache.lengths.clone()  # [B]
        tokens = torch.cat([batch.pending[:, None], proposal.tokens], 1)  # [B, K + 1]
        stream = self.target.model.read(tokens, batch.cache, 1 + proposal.lengths)
        logits = self.target.lm_head(self.target.model.norm(stream))  # [B, K + 1, V]
        if isinstance(self.drafter, HeadDrafter):
            self.drafter.see(stream)
        verdict = self._judge(batch.sampler, logits, proposal, written)
        if self.k > 0:
            batch.cache.rollback(held + 1 + verdict.accepted)
        batch.pending, batch.logits = verdict.following, logits
        return verdict

    @staticmethod
    def _judge(sampler: Sampler, logits: Tensor, proposal: Proposal, written: list[int]) -> Verdict:
        """Accept or reject drafts by logits [B, K + 1, V]; sampling draws a number per position."""
        if sampler.params.greedy:
            return accept_greedy(logits, proposal)
        first = torch.tensor(written, device=logits.device)  # [B]
        at = first[:, None] + torch.arange(logits.shape[1], device=logits.device)  # [B, K + 1]
        emit = sampler.uniform(at, Stream.EMIT)  # [B, K + 1]
        accept = sampler.uniform(at[:, :-1], Stream.ACCEPT)  # [B, K]
        return accept_sampled(sampler.probs(logits), proposal, accept, emit)


def _emit(
    row: int,
    new: list[int],
    params: SamplingParams,
    output: Generation,
    on_tokens: OnTokens | None,
) -> bool:
    """Append tokens up to an eos or where the listener stops; False when the row is finished."""
    ends = [index for index, token in enumerate(new) if token in params.eos_token_ids]
    if ends:
        new = new[: ends[0] + 1]
        output.finish[row] = "eos"
    output.tokens[row].extend(new)
    if on_tokens is not None and on_tokens(row, new) is True and not ends:
        output.finish[row] = "stop"
        return False
    return not ends and len(output.tokens[row]) < params.max_new_tokens
