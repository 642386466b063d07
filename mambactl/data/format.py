"""From a row of text or chat turns to token ids and the mask of tokens worth learning."""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mambactl.data.bad_rows import REFUSED, BadRows
from mambactl.data.sources import Document
from mambactl.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GENERATION = re.compile(r"\{%-?\s*generation\b")
# rows that are tokenised in one call
TOGETHER = 256


class Example(NamedTuple):
    """One document; `loss_mask[t]` says that token t is a target.

    input_ids: int32 [n]; loss_mask: bool [n].
    """

    input_ids: np.ndarray
    loss_mask: np.ndarray


Keep = Callable[[Document, Example], Example | None]


def encode(
    row: dict[str, Any], tokenizer: "PreTrainedTokenizerBase", assistant_only: bool = False
) -> Example:
    """Tokenise one row; with `assistant_only`, chat rows mask everything else.

    Text gets the special tokens the tokenizer itself adds; no end-of-text is appended, because a
    text's cut says nothing about endings. A rendered chat holds its own begin token, so none is
    added. Raises UsageError for a chat that the template refuses, or without a template.
    """
    return _encode_many([row], tokenizer, assistant_only)[0]


def encode_rows(
    rows: Sequence[Document],
    tokenizer: "PreTrainedTokenizerBase",
    assistant_only: bool = False,
    max_tokens: int | None = None,
    seed: int | None = None,
    keep: Keep | None = None,
    bad: BadRows | None = None,
) -> list[Example]:
    """Encode rows, shuffled by `seed` if given, until `max_tokens` are there.

    `keep` says what is kept of an example, None for nothing. Raises UsageError naming file and row,
    unless there is `bad` to note it.
    """
    order: Iterable[int] = range(len(rows))
    if seed is not None:
        order = np.random.default_rng(seed).permutation(len(rows))
    examples: list[Example] = []
    total = 0
    indices = list(order)
    for start in range(0, len(indices), TOGETHER):
        members = [rows[index] for index in indices[start : start + TOGETHER]]
        for row, example in _encode_located(members, tokenizer, assistant_only, bad):
            example = keep(row, example) if keep is not None else example
            if example is None:
                continue
            examples.append(example)
            total += len(example.input_ids)
            if max_tokens is not None and total >= max_tokens:
                return examples
    return examples


def _encode_located(
    rows: Sequence[Document],
    tokenizer: "PreTrainedTokenizerBase",
    assistant_only: bool,
    bad: BadRows | None,
) -> Iterable[tuple[Document, Example]]:
    """Rows with their examples; the first that cannot be encoded is named, after those before."""
    try:
        return zip(rows, _encode_many(rows, tokenizer, assistant_only), strict=True)
    except UsageError:
        return _one_by_one(rows, tokenizer, assistant_only, bad)


def _one_by_one(
    rows: Sequence[Document],
    tokenizer: "PreTrainedTokenizerBase",
    assistant_only: bool,
    bad: BadRows | None,
) -> Iterator[tuple[Document, Example]]:
    for row in rows:
        try:
            yield row, encode(row, tokenizer, assistant_only)
        except UsageError as error:
            # without a template no chat is better than another
            if bad is None or not getattr(tokenizer, "chat_template", None):
                raise UsageError(f"{row.where}: {error}", error.hint) from None
            bad.add(REFUSED, row.where, str(error), error.hint or "correct the data")


def _encode_many(
    rows: Sequence[dict[str, Any]], tokenizer: "PreTrainedTokenizerBase", assistant_only: bool
) -> list[Example]:
    """A fast tokenizer spreads the texts of a call over all cores."""
    is_text = ["text" in row for row in rows]
    texts = [
        row["text"] if text else render_chat(tokenizer, row["messages"], row.get("tools"))
        for row, text in zip(rows, is_text, strict=True)
    ]
    found: dict[int, Example] = {}
    for kind in sorted(set(is_text)):
        indices = [index for index, text in enumerate(is_text) if text == kind]
        masked = assistant_only and not kind
        batch = tokenizer(
            [texts[index] for index in indices],
            add_special_tokens=kind,
            return_offsets_mapping=masked,
            verbose=False,
        )
        for number, index in enumerate(indices):
            ids = np.asarray(batch["input_ids"][number], np.int32)
            mask = np.ones(len(ids), bool)
            if masked:
                offsets = np.asarray(batch["offset_mapping"][number]).reshape(-1, 2)
                mask = _assistant_mask(tokenizer, rows[index], texts[index], offsets)
            found[index] = Example(ids, mask)
    return [found[index] for index in range(len(rows))]


def _assistant_mask(
    tokenizer: "PreTrainedTokenizerBase", row: dict[str, Any], text: str, offsets: np.ndarray
) -> np.ndarray:
    """Which tokens, at character `offsets` [n, 2], the assistant writes.

    A template that marks them is trusted; in others they are found by rendering what comes before.
    """
    marked = GENERATION.search(tokenizer.chat_template)
    spans = _marked_spans(tokenizer, row) if marked else _assistant_spans(tokenizer, row, text)
    mask = np.zeros(len(offsets), bool)
    for start, end in spans:
        mask |= (offsets[:, 0] >= start) & (offsets[:, 1] <= end)
    return mask


def _marked_spans(
    tokenizer: "PreTrainedTokenizerBase", row: dict[str, Any]
) -> Sequence[tuple[int, int]]:
    """Character spans [start, end) between the generation markers of the template."""
    from transformers.utils.chat_template_utils import render_jinja_template

    _, (spans,) = render_jinja_template(
        [row["messages"]],
        row.get("tools"),
        chat_template=tokenizer.chat_template,
        return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map,
    )
    return spans


def _assistant_spans(
    tokenizer: "PreTrainedTokenizerBase", row: dict[str, Any], text: str
) -> Iterator[tuple[int, int]]:
    """Character spans [start, end) that the assistant writes, its end token included.

    A turn starts where the rendering of everything before it plus the generation prompt ends, and
    ends where the rendering through it ends, without the white space the template adds after the
    end token: a model never has to write that.
    """
    messages, tools = row["messages"], row.get("tools")
    for position, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = render_chat(tokenizer, messages[:position], tools, prompt=True) if position else ""
        through = render_chat(tokenizer, messages[: position + 1], tools).rstrip()
        if not (text.startswith(before) and text.startswith(through)):
            raise UsageError(
                "the chat template rewrites earlier turns, so assistant turns cannot be located",
                "use --no-assistant-only-loss",
            )
        yield len(before), len(through)


def render_chat(
    tokenizer: "PreTrainedTokenizerBase",
    messages: list[dict],
    tools: list | None = None,
    prompt: bool = False,
) -> str:
    """Messages through the chat template; with `prompt`, up to where the assistant writes.

    Raises UsageError without a template, or for messages that it refuses.
    """
    from jinja2 import TemplateError

    if not getattr(tokenizer, "chat_template", None):
        raise UsageError(
            "the tokenizer has no chat template, so `messages` cannot be rendered",
            "use rows with `text`, or a checkpoint whose tokenizer has a template",
        )
    try:
        return tokenizer.apply_chat_template(
            messages, tools=tools, tokenize=False, add_generation_prompt=prompt
        )
    except (TemplateError, TypeError, KeyError, ValueError) as error:
        raise UsageError(f"the chat template refuses the messages ({error})") from None
