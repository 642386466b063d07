"""The engine on a GPU: whole steps as CUDA graphs, tokens read when they have long arrived."""

import time
from collections import deque
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import torch

from mambactl import console
from mambactl.decode.conversation import Conversation
from mambactl.decode.copying import Copying, weight_share
from mambactl.decode.draft_count import (
    CHOICES,
    PRIOR_ACCEPTANCE,
    Choice,
    ExpectedTimes,
    Experience,
    LearnedChoice,
    StepTimes,
)
from mambactl.decode.engine import Generation, OnTokens, check_prompts
from mambactl.decode.gpu.fused_batch import LAG, POLL_SECONDS, FusedBatch
from mambactl.decode.gpu.head_pass import PackedHead
from mambactl.decode.gpu.open_session import OpenSession
from mambactl.decode.gpu.session import Session
from mambactl.decode.gpu.state import PackedModel, pack
from mambactl.decode.gpu.step import DEPTH, MOST_EOS
from mambactl.decode.prefix_files import PrefixFolder
from mambactl.decode.sampler import SamplingParams
from mambactl.decode.shared_prefix import Prefixes
from mambactl.errors import UsageError
from mambactl.kernels.decode.operations import DecodeOps
from mambactl.kernels.decode.reference.verdict import Finish, Letter
from mambactl.models.draft_head import DraftHead
from mambactl.models.hybrid import HybridForCausalLM
from mambactl.models.session_size import SessionSize
from mambactl.present import present

K = int | Literal["auto"]


@dataclass
class _Launched:
    """A step under way."""

    number: int
    k: int
    event: torch.cuda.Event | None
    started: float
    copied: bool = False


class FusedEngine:
    """Decodes with `target`, helped by `draft`: a model, a head, "ngram" or None (plain decoding).

    `k` drafts a step, or "auto": as many as pay, perhaps none. `ops` are the operations of a step:
    the GPU's, or the reference's on any device. `copying`: beside a model or a head, steps may take
    their drafts from the text; see `Copying`. Raises NotSupported for what they cannot run.
    """

    def __init__(
        self,
        target: HybridForCausalLM,
        draft: HybridForCausalLM | DraftHead | str | None,
        k: K,
        ops: DecodeOps,
        share: bool = True,
        folder: PrefixFolder | None = None,
        copying: bool = False,
    ):
        if (draft is None) != (k == 0):
            raise ValueError("a draft needs k >= 1 or auto, and k >= 1 needs a draft")
        self.target, self.draft, self.ops = target, draft, ops
        self.k: K = k
        self.copying = copying and isinstance(draft, HybridForCausalLM | DraftHead)
        self.most = max(CHOICES) if k == "auto" else k
        self.packed: tuple[PackedModel, PackedModel | PackedHead | str | None] | None = None
        self.positions = 0
        self.sessions: dict[int, Session] = {}
        self.reserved: Session | None = None
        # a head reads along from the first token on: what was read without it is of no use
        alone = not isinstance(draft, DraftHead)
        prefixes = Prefixes(target.model, share and alone, folder if alone else None)
        self.prefixes: tuple[Prefixes, Prefixes | None] = prefixes, None
        self.times: dict[int, StepTimes] = {}
        self.experience = Experience()
        self.said = ""
        pack(target, 1)
        if isinstance(draft, HybridForCausalLM):
            pack(draft, 1)
            self.prefixes = prefixes, Prefixes(draft.model, share, folder)
        elif isinstance(draft, DraftHead):
            PackedHead.of(draft, 1)

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        on_tokens: OnTokens | None = None,
        keys: Sequence[int] | None = None,
    ) -> Generation:
        """Continue every prompt; see `decode.engine.Engine.generate`."""
        device = self.target.device
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            return self._generate(prompts, params, on_tokens, keys)

    @torch.no_grad()
    def open(self, rows: int, tokens: int, eos: Sequence[int]) -> FusedBatch:
        """Open batch for at most `rows` rows of at most `tokens` tokens, which end with `eos`."""
        _require_few(eos)
        if self.k == "auto":
            raise ValueError("rows that come and go need a fixed number of drafts")
        size = SessionSize.holding(rows, tokens, self.k)
        self._pack(size.capacity)
        device = self.target.device
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            session = OpenSession(*present(self.packed), self.ops, size, eos)
            session.prepare()
        return FusedBatch(session)

    def reserve(self, rows: int, tokens: int) -> None:
        """Decode every later batch of up to `rows` rows of `tokens` tokens in the same memory.

        The graphs that a batch takes then follow from it alone, and not from the batches before.
        """
        device = self.target.device
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            self.reserved = self._session(rows, tokens)

    def converse(self) -> Conversation:
        """Treat later prompts as one conversation, in which each is read from the last one on.

        What was read while an answer was written stays in the session: the next prompt reads the
        answer again, in one pass. With a draft head, which has to read along, every prompt is read
        whole.
        """
        drafter = None
        if isinstance(self.draft, HybridForCausalLM):
            drafter = Conversation(self.draft.model)
        conversation = Conversation(self.target.model)
        if isinstance(self.draft, DraftHead):
            return conversation
        self.prefixes = conversation, drafter
        # they hold what prefixes there were
        self.sessions.clear()
        return conversation

    def _generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        on_tokens: OnTokens | None,
        keys: Sequence[int] | None,
    ) -> Generation:
        check_prompts(prompts, self.target.config.vocab_size)
        _require_few(params.eos_token_ids)
        output = Generation([[] for _ in prompts], ["length" for _ in prompts])
        stats, sampled = output.stats, not params.greedy
        stats.rows, stats.prompt_tokens = len(prompts), sum(map(len, prompts))
        longest = max(map(len, prompts)) + params.max_new_tokens
        session = self._session(len(prompts), longest)
        ks = [k for k in CHOICES if k <= self.most] if self.k == "auto" else [self.k]
        session.prepare(ks, sampled)
        with stats.timed("prefill", self.target.device), self.prefixes[0].counted(stats):
            event = session.start(prompts, keys or range(len(prompts)), params)
        stats.at_once = len(prompts)
        with stats.timed("verify", self.target.device):
            choice = self._choice(session, ks, sampled)
            copying = self._copying(session, prompts)
            run = _Run(session, choice, sampled, params.max_new_tokens, output, on_tokens, copying)
            run.waiting.append(_Launched(0, 0, event, 0.0))
            run.finish()
        if not sampled:
            self.experience.learn(choice)
        self._say(choice)
        stats.tokens = sum(map(len, output.tokens))
        return output

    def _choice(self, session: Session, ks: list[int], sampled: bool) -> Choice:
        if len(ks) == 1:
            return Choice({ks[0]: 1.0})
        if not self.ops.on_host:
            # what is drawn follows from the number of drafts: from no other text than its own
            prior = PRIOR_ACCEPTANCE if sampled else self.experience.acceptance
            return Choice(session.time_steps(ks, sampled), prior=prior)
        model = isinstance(self.draft, HybridForCausalLM | DraftHead)
        if sampled:
            share = weight_share(self.draft, self.target)
            return LearnedChoice(ks, ExpectedTimes(share), model)
        times = self.times.setdefault(session.size, StepTimes())
        if model and not times.count(0):
            times.add(0, session.time_plain(sampled))
        return LearnedChoice(ks, times, model)

    def _copying(self, session: Session, prompts: Sequence[Sequence[int]]) -> Copying | None:
        if not self.copying:
            return None
        copying = Copying(weight_share(self.draft, self.target), session.k)
        copying.start(prompts)
        return copying

    def _say(self, choice: Choice) -> None:
        """Log the reason for the number of drafts when that number has changed."""
        outcome = choice.reason.partition(":")[0]
        if outcome and outcome != self.said:
            self.said = outcome
            console.log(choice.reason)

    def _session(self, rows: int, longest: int) -> Session:
        """Memory and graphs for at least `rows` rows of `longest` tokens, kept between calls."""
        size = SessionSize.holding(rows, longest, self.most)
        kept = self.reserved
        if kept is not None and rows <= kept.size and size.capacity <= kept.capacity:
            return kept
        # idle rows cost less than new memory and graphs, up to as many as there are others
        for known in self.sessions.values():
            if rows <= known.size <= 2 * rows and known.capacity >= size.capacity:
                return known
        # two batches' caches need not fit at the same time
        self.sessions.clear()
        self.reserved = None
        self._pack(size.capacity)
        session = Session(*present(self.packed), self.ops, size, self.prefixes, self.copying)
        self.sessions[size.batch] = session
        return session

    def _pack(self, positions: int) -> None:
        """Pack the models for `positions` positions, unless they are for as many already."""
        if positions > self.positions:
            draft = self.draft
            if isinstance(draft, HybridForCausalLM):
                draft = pack(draft, positions)
            elif isinstance(draft, DraftHead):
                draft = PackedHead.of(draft, positions)
            self.packed, self.positions = (pack(self.target, positions), draft), positions


def _require_few(eos: Sequence[int]) -> None:
    """Raise UsageError for more end tokens than a step can tell apart."""
    if len(eos) > MOST_EOS:
        raise UsageError(
            f"{len(eos)} end tokens, but the GPU engine takes {MOST_EOS}",
            hint="MAMBACTL_KERNELS=reference decodes without it",
        )


class _Run:
    """The host's part of one generation: launch, look back, hand tokens on."""

    def __init__(
        self,
        session: Session,
        choice: Choice,
        sampled: bool,
        budget: int,
        output: Generation,
        on_tokens: OnTokens | None,
        copying: Copying | None,
    ):
        self.session, self.choice, self.sampled = session, choice, sampled
        self.budget = budget
        self.output, self.on_tokens, self.copying = output, on_tokens, copying
        self.running = set(range(len(output.tokens)))
        self.waiting: deque[_Launched] = deque()

    def finish(self) -> None:
        """Run until every row is done; the first tokens are on their way."""
        number = 1
        # what a text repeats is known by its last token
        lag = LAG if self.session.device.type == "cuda" and self.copying is None else 0
        if not lag:
            # nothing runs meanwhile
            self._read(self.waiting.popleft())
        while self.running:
            if self._more_needed():
                k = self.choice.update()
                copied = self.copying is not None and self.copying.due(self.running, k)
                k = self.session.k if copied else k
                started = time.perf_counter()
                event = self.session.launch(k, self.sampled, copied)
                self.waiting.append(_Launched(number, k, event, started, copied))
                number += 1
                # the first token is handed on while the first step runs
                if number > 2 and len(self.waiting) <= lag:
                    continue
            self._read(self.waiting.popleft())

    def _more_needed(self) -> bool:
        """True if the steps under way, one token each at least, may leave a row unfinished."""
        shortest = min(len(self.output.tokens[row]) for row in self.running)
        return shortest + len(self.waiting) < self.budget

    def _read(self, step: _Launched) -> None:
        while step.event is not None and not step.event.query():
            time.sleep(POLL_SECONDS)
        seconds = time.perf_counter() - step.started
        letters = self.session.batch.pinned[step.number % DEPTH].tolist()
        drafted, accepted = [], []
        for row in sorted(self.running):
            letter = letters[row]
            if letter[Letter.FINISH] == Finish.IDLE:
                continue
            drafted.append(letter[Letter.DRAFTED])
            accepted.append(letter[Letter.ACCEPTED])
            # in a graph a draft that could not be made helps no more than a rejected one
            made = letter[Letter.DRAFTED] if self.session.on_host else step.k
            if not step.copied:
                self.choice.observe(made, accepted[-1])
            new = letter[len(Letter) : len(Letter) + letter[Letter.EMITTED]]
            if self.copying is not None:
                self.copying.add(row, new)
                if not step.copied:
                    self.copying.drafted.observe(made, accepted[-1])
            self.output.tokens[row].extend(new)
            stop = self.on_tokens is not None and self.on_tokens(row, new) is True
            if letter[Letter.FINISH] != Finish.RUNNING:
                self.output.finish[row] = "eos" if letter[Letter.FINISH] == Finish.EOS else "length"
                self.running.discard(row)
            elif stop:
                # on the device the row goes on, unheard
                self.output.finish[row] = "stop"
                self.running.discard(row)
        # the first tokens are the prompts', not a step's
        if drafted and step.number:
            self.output.stats.count_step(drafted, accepted)
            if isinstance(self.choice, LearnedChoice) and not step.copied:
                self.choice.timed(max(drafted), seconds, 1 + sum(accepted) / len(accepted))
