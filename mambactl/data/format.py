"""From a row of text or chat turns to token ids and the mask of tokens worth learning."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from mambactl.data.load import Document
from mambactl.errors import UsageError


class Example(NamedTuple):
    """One document; `loss_mask[t]` says that token t is a target.

    input_ids: int32 [n]; loss_mask: bool [n].
    """

    input_ids: np.ndarray
    loss_mask: np.ndarray


def encode(row: dict[str, Any], tokenizer: Any, assistant_only: bool = False) -> Example:
    """Tokenise one row; with `assistant_only`, chat rows mask everything else.

    Text gets the special tokens the tokenizer itself adds; no end-of-text is appended, because a
    text's cut says nothing about endings. A rendered chat holds its own begin token, so none is
    added. Raises UsageError for a chat that the template refuses, or without a template.
    """
    if "text" in row:
        ids = tokenizer(row["text"], verbose=False)["input_ids"]
        return Example(np.asarray(ids, np.int32), np.ones(len(ids), bool))
    text = _render(tokenizer, row["messages"], row.get("tools"))
    batch = tokenizer(
        text, add_special_tokens=False, return_offsets_mapping=assistant_only, verbose=False
    )
    ids = np.asarray(batch["input_ids"], np.int32)
    if not assistant_only:
        return Example(ids, np.ones(len(ids), bool))
    mask = np.zeros(len(ids), bool)
    offsets = np.asarray(batch["offset_mapping"]).reshape(-1, 2)
    for start, end in _assistant_spans(tokenizer, row["messages"], row.get("tools"), text):
        mask |= (offsets[:, 0] >= start) & (offsets[:, 1] <= end)
    return Example(ids, mask)


def encode_rows(
    rows: Sequence[Document],
    tokenizer: Any,
    assistant_only: bool = False,
    max_tokens: int | None = None,
    seed: int | None = None,
) -> list[Example]:
    """Encode rows, shuffled by `seed` if given, until `max_tokens` are there.

    Raises UsageError naming file and row.
    """
    order: Iterable[int] = range(len(rows))
    if seed is not None:
        order = np.random.default_rng(seed).permutation(len(rows))
    examples: list[Example] = []
    total = 0
    for index in order:
        try:
            example = encode(rows[index], tokenizer, assistant_only)
        except UsageError as error:
            raise UsageError(f"{rows[index].where}: {error}", error.hint) from None
        examples.append(example)
        total += len(example.input_ids)
        if max_tokens is not None and total >= max_tokens:
            break
    return examples


def _assistant_spans(
    tokenizer: Any, messages: list[dict], tools: list | None, text: str
) -> Iterator[tuple[int, int]]:
    """Character spans [start, end) that the assistant writes, its end token included.

    A turn starts where the rendering of everything before it plus the generation prompt ends, and
    ends where the rendering through it ends, without the white space the template adds after the
    end token: a model never has to write that.
    """
    for position, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _render(tokenizer, messages[:position], tools, prompt=True) if position else ""
        through = _render(tokenizer, messages[: position + 1], tools).rstrip()
        if not (text.startswith(before) and text.startswith(through)):
            raise UsageError(
                "the chat template rewrites earlier turns, so assistant turns cannot be located",
                "use --no-assistant-only-loss",
            )
        yield len(before), len(through)


def _render(tokenizer: Any, messages: list[dict], tools: list | None, prompt: bool = False) -> str:
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
