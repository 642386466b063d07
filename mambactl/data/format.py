"""From a row of text or chat turns to token ids and the mask of tokens worth learning."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import date
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from mambactl import console
from mambactl.checkpoint.vocabulary import beyond_embedding, token_id
from mambactl.data.answer_spans import spans_of
from mambactl.data.bad_rows import BEYOND, LOST, REFUSED, BadRows
from mambactl.data.begin_token import begun_twice
from mambactl.data.chat_template import ChatRenderer, TemplateStopped
from mambactl.data.doubts import Doubt, Doubts
from mambactl.data.encoding import Example
from mambactl.data.rendered import LostTurn, compared
from mambactl.data.renderers import ChatRenderers
from mambactl.data.row_forms import COMPLETION, PROMPT, TEMPLATE, TEXT
from mambactl.data.sources import Document
from mambactl.data.token_cache import TokenCache
from mambactl.data.turns import Record, Row
from mambactl.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# rows that are tokenised in one call
TOGETHER = 256


Keep = Callable[[Document, Example], Example | None]


@dataclass(frozen=True)
class Rules:
    """Rules by which rows become examples.

    With `assistant_only` answers alone are learned, of chats and of prompts with a completion. With
    `append_eos` texts end with the end token. `day` is today for chat templates. Tokens from
    `vocabulary` on have no row in the embedding.
    """

    assistant_only: bool = False
    append_eos: bool = False
    day: date | None = None
    vocabulary: int | None = None


def encode(row: Row, tokenizer: "PreTrainedTokenizerBase", assistant_only: bool = False) -> Example:
    """Tokenise one row; with `assistant_only`, chat rows mask everything else.

    Text gets the special tokens the tokenizer itself adds; no end-of-text is appended unless it is
    asked for, because a text's cut says nothing about endings. A completion ends, and has one. A
    rendered chat holds its own begin token, so none is added. Raises UsageError for a chat that the
    template refuses, or without a template.
    """
    with ChatRenderers(tokenizer, [row]) as renderers:
        return _Encoder(renderers, Rules(assistant_only)).many([row])[0]


def encode_rows(
    rows: Sequence[Document],
    tokenizer: "PreTrainedTokenizerBase",
    assistant_only: bool = False,
    max_tokens: int | None = None,
    seed: int | None = None,
    keep: Keep | None = None,
    bad: BadRows | None = None,
    rules: Rules | None = None,
    doubts: Doubts | None = None,
) -> list[Example]:
    """Encode rows, shuffled by `seed` if given, until `max_tokens` are there.

    `keep` says what is kept of an example, None for nothing. Raises UsageError naming file and row,
    unless there is `bad` to note it. With `doubts` chats are compared with what the template made
    of them.
    """
    rules = rules or Rules(assistant_only)
    order: Iterable[int] = range(len(rows))
    if seed is not None:
        order = np.random.default_rng(seed).permutation(len(rows))
    examples: list[Example] = []
    total = 0
    indices = list(order)
    asked = {"append_eos": rules.append_eos, "compared": doubts is not None}
    cache = TokenCache(tokenizer, rules.assistant_only, rules.day, asked)
    state = {"rows": 0}
    with (
        ChatRenderers(tokenizer, rows, rules.day) as renderers,
        console.doing(lambda: f"tokenising: {state['rows']:,} of {len(rows):,} rows"),
    ):
        encoder = _Encoder(renderers, rules, bad, doubts)
        for start in range(0, len(indices), TOGETHER):
            members = [rows[index] for index in indices[start : start + TOGETHER]]
            state["rows"] = start
            for row, example in encoder.kept_or_encoded(members, cache):
                example = keep(row, example) if keep is not None else example
                if example is None:
                    continue
                examples.append(example)
                total += len(example.input_ids)
                if max_tokens is not None and total >= max_tokens:
                    cache.publish()
                    return examples
    cache.publish()
    return examples


class _Rendered(NamedTuple):
    """A row as text, the character spans [start, end) that are learned (None: all), and doubts."""

    text: str
    spans: Sequence[tuple[int, int]] | None = None
    doubts: Sequence[Doubt] = ()


@dataclass
class _Encoder:
    """Rows as examples, by rules, with what is wrong with some of them."""

    renderers: ChatRenderers
    rules: Rules
    bad: BadRows | None = None
    doubts: Doubts | None = None
    # rows that are looked at again in the next run
    doubted: set[int] = field(default_factory=set)

    def kept_or_encoded(
        self, rows: Sequence[Document], cache: TokenCache
    ) -> Iterator[tuple[Document, Example]]:
        """Rows with their examples, in order; only what no run before has kept is tokenised."""
        kept = [cache.find(row) for row in rows]
        missing = [row for row, example in zip(rows, kept, strict=True) if example is None]
        self.doubted.clear()
        fresh = iter(self._located(missing))
        ahead: tuple[Document, Example] | None = None
        for row, example in zip(rows, kept, strict=True):
            if example is None:
                # one that is refused is left out
                ahead = next(fresh, None) if ahead is None else ahead
                if ahead is None or ahead[0] is not row:
                    continue
                example, ahead = ahead[1], None
                if id(row) not in self.doubted:
                    cache.add(row, example)
            if self._is_known(row, example):
                yield row, example

    def _is_known(self, row: Document, example: Example) -> bool:
        """Return True if every token has a row in the embedding; else note or refuse the row."""
        rows = self.rules.vocabulary
        problem = rows and beyond_embedding(example.input_ids, rows, self.renderers.tokenizer)
        if not problem:
            return True
        cure = "take it out of the data, or give a checkpoint whose embedding has a row for it"
        if self.bad is None:
            raise UsageError(f"{row.where}: {problem}", cure)
        self.bad.add(BEYOND, row.where, problem, cure)
        return False

    def _located(self, rows: Sequence[Document]) -> Iterable[tuple[Document, Example]]:
        """Rows with their examples; the first that cannot be encoded is named, after others."""
        try:
            return zip(rows, self.many(rows), strict=True)
        except TemplateStopped:
            raise
        except UsageError:
            return self._one_by_one(rows)

    def _one_by_one(self, rows: Sequence[Document]) -> Iterator[tuple[Document, Example]]:
        for row in rows:
            try:
                yield row, self.many([row])[0]
            except TemplateStopped:
                raise
            except UsageError as error:
                # without a template no chat is better than another
                template = getattr(self.renderers.tokenizer, "chat_template", None)
                if self.bad is None or not template:
                    raise UsageError(f"{row.where}: {error}", error.hint) from None
                kind = LOST if isinstance(error, LostTurn) else REFUSED
                self.bad.add(kind, row.where, str(error), error.hint or "correct the data")

    def many(self, rows: Sequence[Record]) -> list[Example]:
        """Examples of rows; a fast tokenizer spreads the texts of a call over all cores."""
        parts = self.renderers.map(self._rendered, rows)
        for row, part in zip(rows, parts, strict=True):
            for doubt in part.doubts:
                if self.doubts is not None:
                    self.doubts.add(doubt, getattr(row, "where", "this one"))
                    self.doubted.add(id(row))
        # a chat holds its special tokens already
        plain = ["messages" not in row for row in rows]
        found: dict[int, Example] = {}
        for kind in sorted(set(plain)):
            indices = [index for index, each in enumerate(plain) if each == kind]
            for index, example in zip(
                indices, self._tokens(kind, [parts[i] for i in indices]), strict=True
            ):
                ends = COMPLETION in rows[index] or (kind and self.rules.append_eos)
                found[index] = self._ended(example) if ends else example
        return [found[index] for index in range(len(rows))]

    def _tokens(self, plain: bool, parts: Sequence[_Rendered]) -> Iterator[Example]:
        tokenizer = self.renderers.tokenizer
        masked = any(part.spans is not None for part in parts)
        batch = tokenizer(
            [part.text for part in parts],
            add_special_tokens=plain,
            return_offsets_mapping=masked,
            verbose=False,
        )
        for number, part in enumerate(parts):
            ids = np.asarray(batch["input_ids"][number], np.int32)
            mask = np.ones(len(ids), bool)
            if part.spans is not None:
                offsets = np.asarray(batch["offset_mapping"][number]).reshape(-1, 2)
                mask = _inside(part.spans, offsets, whole=not plain)
            if plain and begun_twice(part.text, ids, tokenizer):
                ids, mask = ids[1:], mask[1:]
            yield Example(ids, mask)

    def _ended(self, example: Example) -> Example:
        """An example with the end token behind it, which is learned."""
        end = token_id(self.renderers.tokenizer.eos_token_id)
        ids, mask = example
        if end is None:
            raise UsageError("the tokenizer has no end token", "drop --append-eos")
        if len(ids) and ids[-1] == end:
            mask = mask.copy()
            mask[-1] = True
            return Example(ids, mask)
        return Example(np.append(ids, np.int32(end)), np.append(mask, True))

    def _rendered(self, row: Record, renderer: ChatRenderer) -> _Rendered:
        if TEXT in row:
            return _Rendered(row[TEXT])
        if COMPLETION in row:
            text = row[PROMPT] + row[COMPLETION]
            spans = [(len(row[PROMPT]), len(text))] if self.rules.assistant_only else None
            return _Rendered(text, spans)
        try:
            doubts: list[Doubt] = []
            text = renderer.render(row["messages"], row.get("tools"), **row.get(TEMPLATE, {}))
            compares, spans = self.doubts is not None, None
            if self.rules.assistant_only:
                if compares:
                    # what is not there has no place, and this says why
                    compared(row, text, None)
                spans = spans_of(row, renderer, text, doubts)
            if compares:
                doubts += compared(row, text, spans)
            return _Rendered(text, spans, doubts)
        except TemplateStopped as error:
            raise error.at(row.where) if isinstance(row, Document) else error from None


def _inside(
    spans: Sequence[tuple[int, int]], offsets: np.ndarray, whole: bool = True
) -> np.ndarray:
    """Mask [n] of the tokens, at character `offsets` [n, 2], that lie in one of the spans.

    Unless it has to lie there as a `whole`, a token that reaches into a span counts as well.
    """
    mask = np.zeros(len(offsets), bool)
    for start, end in spans:
        begins = offsets[:, 0] >= start if whole else offsets[:, 1] > start
        mask |= begins & (offsets[:, 1] <= end)
    return mask
