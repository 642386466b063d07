"""Prompts that a student writes on from: beginnings of the rows of `--data`, drawn by number.

Of a chat it is everything before the last answer, with the start of the answer as the template
writes it; of a prompt with a completion the prompt; of a text its first half, at most as many
tokens as an answer may have.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mambactl import console
from mambactl.checkpoint.vocabulary import beyond_embedding, model_config, stored_end_tokens
from mambactl.data.bad_rows import BEYOND, LONG, UNFIT, BadRows
from mambactl.data.chat_template import ChatRenderer, TemplateStopped
from mambactl.data.encoding import Example
from mambactl.data.format import TOGETHER, Rules, encode_rows
from mambactl.data.mixture import shares
from mambactl.data.renderers import ChatRenderers
from mambactl.data.row_forms import PROMPT, TEXT
from mambactl.data.sources import Document
from mambactl.decode.prompts import Prompt, encode_with
from mambactl.errors import UsageError
from mambactl.options import DistillConfig
from mambactl.options.on_policy import STAGE as ON_POLICY
from mambactl.train.job import Job
from mambactl.train.phases import PhasePlan
from mambactl.train.rows import read_documents

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MESSAGES = "messages"
Tokens = list[int]


@dataclass(frozen=True)
class DrawnPrompts:
    """Prompts of at least one token, with the probabilities [n] that each is drawn next.

    `ends` are the tokens that end what is written behind them.
    """

    prompts: Sequence[Tokens]
    chances: np.ndarray
    ends: Sequence[int]

    def draw(self, seed: int, number: int, count: int) -> list[Tokens]:
        """Draw `count` prompts, by seed and number alone; none twice, if there are enough."""
        chosen = np.random.default_rng([seed, number]).choice(
            len(self.prompts),
            count,
            replace=count > len(self.prompts),
            p=self.chances,
        )
        return [self.prompts[index] for index in chosen]

    def divided(self, held: Collection[int]) -> tuple["DrawnPrompts", "DrawnPrompts"]:
        """Prompts at the indices `held`, and all others."""
        others = [number for number in range(len(self.prompts)) if number not in held]
        return self._at(list(held)), self._at(others)

    def _at(self, indices: Sequence[int]) -> "DrawnPrompts":
        chances = self.chances[indices]
        return DrawnPrompts([self.prompts[n] for n in indices], chances / chances.sum(), self.ends)

    @property
    def shortest(self) -> int:
        """Tokens of the shortest prompt."""
        return min(map(len, self.prompts))

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return max(map(len, self.prompts))


def answers_at_most(config: DistillConfig, shortest: int) -> int:
    """Most answers of a batch, if no prompt is shorter than `shortest` tokens."""
    each = config.max_length // (shortest + config.onpolicy_tokens) if config.packing else 1
    return config.rows_written(config.batch_size) * max(1, each)


def drawn_prompts(
    job: Job,
    config: DistillConfig,
    tokenizer: "PreTrainedTokenizerBase",
    planned: Sequence[PhasePlan],
) -> DrawnPrompts | None:
    """Prompts from `data`, as many as the run can answer; None for a run that answers none.

    Raises UsageError for malformed rows, unless they were reported with rows to train on.
    """
    steps = sum(plan.steps for plan in planned if plan.kind == ON_POLICY)
    if not steps:
        return None
    malformed = BadRows(skip=config.skip_bad_rows)
    documents = read_documents(job, malformed)
    if not config.needs_answers:
        malformed.settle()
    found = prompts_of(job, config, tokenizer, documents, steps)
    console.log(f"{len(found.prompts):,} prompts to write on from")
    return found


def prompts_of(
    job: Job,
    config: DistillConfig,
    tokenizer: "PreTrainedTokenizerBase",
    documents: Sequence[Document],
    steps: int,
) -> DrawnPrompts:
    """Prompts of documents of `data`, as many as a run of `steps` can answer.

    A mixture keeps its weights. Rows that give no prompt are left out and named; raises UsageError
    where nothing is left.
    """
    wanted = steps * config.grad_accum * job.processes * answers_at_most(config, 1)
    found: list[Tokens] = []
    chances: list[float] = []
    reading = _Reading(job, config, tokenizer, BadRows(skip=True))
    order = np.random.default_rng(config.seed).permutation(len(documents))
    weights = shares(config.data)
    for part, weight in enumerate(weights or [1.0]):
        own = [documents[n] for n in order if weights is None or documents[n].part == part]
        prompts = reading.prompts(own[: max(1, round(weight * wanted))])
        found += prompts
        chances += [weight / max(1, len(prompts))] * len(prompts)
    reading.bad.settle()
    if not found:
        cures = [bad.cure for bad in reading.bad.found] or ["give chats, or longer texts"]
        raise UsageError("the data holds no prompt to write on from", cures[0])
    ends = stored_end_tokens(job.source, tokenizer)
    return DrawnPrompts(found, np.array(chances) / sum(chances), ends)


@dataclass(frozen=True)
class _Reading:
    """Documents on their way to prompts; those that give none are noted in `bad`."""

    job: Job
    config: DistillConfig
    tokenizer: "PreTrainedTokenizerBase"
    bad: BadRows

    @property
    def room(self) -> int:
        """Tokens of a row that an answer leaves to its prompt."""
        return self.config.max_length - self.config.onpolicy_tokens

    @property
    def vocabulary(self) -> int:
        """Tokens that have a row in the embedding."""
        return model_config(self.job.source).vocab_size

    def prompts(self, documents: Sequence[Document]) -> list[Tokens]:
        """Prompts of the documents, chats first."""
        chats = [document for document in documents if MESSAGES in document]
        texts = [document for document in documents if MESSAGES not in document]
        return [*self._of_chats(chats), *self._of_texts(texts)]

    def _of_texts(self, documents: Sequence[Document]) -> list[Tokens]:
        rules = Rules(day=self.job.day, vocabulary=self.vocabulary)
        asked = [_prompt_alone(document) for document in documents]
        examples = encode_rows(
            asked, self.tokenizer, keep=self._beginning, bad=self.bad, rules=rules
        )
        return [example.input_ids.tolist() for example in examples]

    def _beginning(self, row: Document, example: Example) -> Example | None:
        length = len(example.input_ids)
        if PROMPT not in row:
            length = min(length // 2, self.config.onpolicy_tokens, self.room)
        if not length or not self._fits(row, length):
            return None
        return Example(example.input_ids[:length], example.loss_mask[:length])

    def _of_chats(self, documents: Sequence[Document]) -> Iterator[Tokens]:
        vocabulary, state = self.vocabulary, {"rows": 0}
        with (
            ChatRenderers(self.tokenizer, documents, self.job.day) as renderers,
            console.doing(lambda: f"encoding prompts: {state['rows']:,} of {len(documents):,}"),
        ):
            for start in range(0, len(documents), TOGETHER):
                members, state["rows"] = documents[start : start + TOGETHER], start
                for row, made in zip(members, renderers.map(_question, members), strict=True):
                    if isinstance(made, UsageError):
                        self.bad.add(UNFIT, row.where, str(made), made.hint or "correct the data")
                    elif problem := beyond_embedding(made, vocabulary, self.tokenizer):
                        self.bad.add(BEYOND, row.where, problem)
                    elif self._fits(row, len(made)):
                        yield made

    def _fits(self, row: Document, length: int) -> bool:
        """True if a prompt of `length` tokens leaves enough of a row to an answer."""
        if length <= self.room:
            return True
        problem = f"has a prompt of {length} tokens, and a row leaves it {self.room}"
        cure = "raise --max-length, or lower --onpolicy-tokens (of draft: --answer-tokens)"
        self.bad.add(LONG, row.where, problem, cure)
        return False


def _question(row: Document, renderer: ChatRenderer) -> Tokens | UsageError:
    """A chat up to its last answer, or why it has none."""
    try:
        return encode_with(renderer, Prompt.before_answer(row))
    except TemplateStopped as error:
        raise error.at(row.where) from None
    except UsageError as error:
        return error


def _prompt_alone(document: Document) -> Document:
    """Keep a text as it is, and the prompt of a pair as a text."""
    if PROMPT not in document:
        return document
    row = {TEXT: document[PROMPT], PROMPT: document[PROMPT]}
    return Document(document.where, row, document.part)
