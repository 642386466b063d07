"""From a row of text or chat turns to token ids and the mask of tokens worth learning."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mambactl import console
from mambactl.data.bad_rows import REFUSED, BadRows
from mambactl.data.chat_template import ChatRenderer, TemplateStopped
from mambactl.data.encoding import Example
from mambactl.data.renderers import ChatRenderers
from mambactl.data.sources import Document
from mambactl.data.token_cache import TokenCache
from mambactl.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# rows that are tokenised in one call
TOGETHER = 256


Keep = Callable[[Document, Example], Example | None]


def encode(
    row: dict[str, Any], tokenizer: "PreTrainedTokenizerBase", assistant_only: bool = False
) -> Example:
    """Tokenise one row; with `assistant_only`, chat rows mask everything else.

    Text gets the special tokens the tokenizer itself adds; no end-of-text is appended, because a
    text's cut says nothing about endings. A rendered chat holds its own begin token, so none is
    added. Raises UsageError for a chat that the template refuses, or without a template.
    """
    with ChatRenderers(tokenizer, [row]) as renderers:
        return _encode_many([row], renderers, assistant_only)[0]


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
    cache = TokenCache(tokenizer, assistant_only)
    state = {"rows": 0}
    with (
        ChatRenderers(tokenizer, rows) as renderers,
        console.doing(lambda: f"tokenising: {state['rows']:,} of {len(rows):,} rows"),
    ):
        for start in range(0, len(indices), TOGETHER):
            members = [rows[index] for index in indices[start : start + TOGETHER]]
            state["rows"] = start
            for row, example in _kept_or_encoded(members, cache, renderers, assistant_only, bad):
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


def _kept_or_encoded(
    rows: Sequence[Document],
    cache: TokenCache,
    renderers: ChatRenderers,
    assistant_only: bool,
    bad: BadRows | None,
) -> Iterator[tuple[Document, Example]]:
    """Rows with their examples, in order; only those that no run before has kept are tokenised."""
    kept = [cache.find(row) for row in rows]
    missing = [row for row, example in zip(rows, kept, strict=True) if example is None]
    fresh = iter(_encode_located(missing, renderers, assistant_only, bad))
    ahead: tuple[Document, Example] | None = None
    for row, example in zip(rows, kept, strict=True):
        if example is not None:
            yield row, example
            continue
        # one that is refused is left out
        ahead = next(fresh, None) if ahead is None else ahead
        if ahead is not None and ahead[0] is row:
            cache.add(*ahead)
            yield ahead
            ahead = None


def _encode_located(
    rows: Sequence[Document], renderers: ChatRenderers, assistant_only: bool, bad: BadRows | None
) -> Iterable[tuple[Document, Example]]:
    """Rows with their examples; the first that cannot be encoded is named, after those before."""
    try:
        return zip(rows, _encode_many(rows, renderers, assistant_only), strict=True)
    except TemplateStopped:
        raise
    except UsageError:
        return _one_by_one(rows, renderers, assistant_only, bad)


def _one_by_one(
    rows: Sequence[Document], renderers: ChatRenderers, assistant_only: bool, bad: BadRows | None
) -> Iterator[tuple[Document, Example]]:
    for row in rows:
        try:
            yield row, _encode_many([row], renderers, assistant_only)[0]
        except TemplateStopped:
            raise
        except UsageError as error:
            # without a template no chat is better than another
            if bad is None or not getattr(renderers.tokenizer, "chat_template", None):
                raise UsageError(f"{row.where}: {error}", error.hint) from None
            bad.add(REFUSED, row.where, str(error), error.hint or "correct the data")


def _encode_many(
    rows: Sequence[dict[str, Any]], renderers: ChatRenderers, assistant_only: bool
) -> list[Example]:
    """A fast tokenizer spreads the texts of a call over all cores."""
    is_text = ["text" in row for row in rows]
    parts = renderers.map(lambda row, renderer: _rendered(row, renderer, assistant_only), rows)
    found: dict[int, Example] = {}
    for kind in sorted(set(is_text)):
        indices = [index for index, text in enumerate(is_text) if text == kind]
        masked = assistant_only and not kind
        batch = renderers.tokenizer(
            [parts[index].text for index in indices],
            add_special_tokens=kind,
            return_offsets_mapping=masked,
            verbose=False,
        )
        for number, index in enumerate(indices):
            ids = np.asarray(batch["input_ids"][number], np.int32)
            mask = np.ones(len(ids), bool)
            if masked:
                offsets = np.asarray(batch["offset_mapping"][number]).reshape(-1, 2)
                mask = _inside(parts[index].spans, offsets)
            found[index] = Example(ids, mask)
    return [found[index] for index in range(len(rows))]


class _Rendered(NamedTuple):
    """A row as text, and the character spans [start, end) that are learned of a masked chat."""

    text: str
    spans: Sequence[tuple[int, int]] = ()


def _rendered(row: dict[str, Any], renderer: ChatRenderer, assistant_only: bool) -> _Rendered:
    if "text" in row:
        return _Rendered(row["text"])
    try:
        text = renderer.render(row["messages"], row.get("tools"))
        return _Rendered(text, _spans(row, renderer, text) if assistant_only else ())
    except TemplateStopped as error:
        raise error.at(row.where) if isinstance(row, Document) else error from None


def _spans(row: dict[str, Any], renderer: ChatRenderer, text: str) -> Sequence[tuple[int, int]]:
    """What the assistant writes of a chat.

    A template that marks it is trusted; in others it is found by rendering what comes before.
    """
    if renderer.marks(row.get("tools")):
        return renderer.spans(row["messages"], row.get("tools"))
    return list(_assistant_spans(row, renderer, text))


def _inside(spans: Sequence[tuple[int, int]], offsets: np.ndarray) -> np.ndarray:
    """Which tokens, at character `offsets` [n, 2], lie in one of the spans."""
    mask = np.zeros(len(offsets), bool)
    for start, end in spans:
        mask |= (offsets[:, 0] >= start) & (offsets[:, 1] <= end)
    return mask


def _assistant_spans(
    row: dict[str, Any], renderer: ChatRenderer, text: str
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
        before = renderer.render(messages[:position], tools, prompt=True) if position else ""
        through = renderer.render(messages[: position + 1], tools).rstrip()
        if not (text.startswith(before) and text.startswith(through)):
            raise UsageError(
                "the chat template rewrites earlier turns, so assistant turns cannot be located",
                "use --no-assistant-only-loss",
            )
        yield len(before), len(through)
