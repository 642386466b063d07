"""Positions of a chat's answers in the text that its template makes of it."""

import os
from collections.abc import Iterator, Sequence

from mambactl.data.chat_template import ChatRenderer
from mambactl.data.doubts import Doubt
from mambactl.data.rendered import OPENED
from mambactl.data.row_forms import TEMPLATE
from mambactl.data.turns import ASSISTANT, Record
from mambactl.errors import UsageError

# an answer that begins as no other does
_OTHER = "\ue000"
REWRITES = "the chat template rewrites earlier turns, so assistant turns cannot be located"


def spans_of(
    row: Record, renderer: ChatRenderer, text: str, doubts: list[Doubt]
) -> list[tuple[int, int]]:
    """Character spans [start, end) of the answers that are learned, their end tokens included.

    A template that marks them is trusted; in others they are found by rendering what comes before.
    """
    messages, learned = row["messages"], row.get("learned")
    answers = [n for n, message in enumerate(messages) if message["role"] == ASSISTANT]
    if renderer.marks(row.get("tools")):
        spans = renderer.spans(messages, row.get("tools"), **row.get(TEMPLATE, {}))
        if learned is None:
            return spans
        if len(spans) == len(answers):
            pairs = zip(answers, spans, strict=True)
            return [span for position, span in pairs if position in learned]
    wanted = answers if learned is None else learned
    return list(_located(row, renderer, text, wanted, doubts))


def _located(
    row: Record,
    renderer: ChatRenderer,
    text: str,
    positions: Sequence[int],
    doubts: list[Doubt],
) -> Iterator[tuple[int, int]]:
    """Spans of the turns at `positions`.

    A turn ends where the rendering through it ends, without the white space the template adds after
    the end token: a model never has to write that.
    """
    messages = row["messages"]
    for position in positions:
        asked = _asked(row, position, renderer)
        through = _render(renderer, row, messages[: position + 1]).rstrip()
        if text.startswith(asked) and text.startswith(through):
            yield len(asked), len(through)
            continue
        span = _by_difference(row, position, renderer, text)
        if span is None:
            raise UsageError(REWRITES, "use --no-assistant-only-loss")
        plain = _render(renderer, row, messages[:position])
        yield _opened(asked, plain, text, span[0], doubts), span[1]


def start_of_answer(
    row: Record,
    position: int,
    renderer: ChatRenderer,
    text: str,
    doubts: list[Doubt],
) -> int | None:
    """Start of the turn at `position` in the rendering `text` of a chat; None if it is not found.

    That is the end of everything before it, generation prompt included. Some templates open a block
    there that whole answers do not begin with: then it is the point from which another answer would
    differ.
    """
    asked = _asked(row, position, renderer)
    if text.startswith(asked):
        return len(asked)
    span = _by_difference(row, position, renderer, text)
    plain = _render(renderer, row, row["messages"][:position])
    if span is None or not text.startswith(plain):
        return None
    return _opened(asked, plain, text, span[0], doubts)


def _asked(row: Record, position: int, renderer: ChatRenderer) -> str:
    """Text that the model reads before a turn: the earlier ones and the generation prompt."""
    before = row["messages"][:position]
    return _render(renderer, row, before, prompt=True) if before else ""


def _opened(asked: str, plain: str, text: str, start: int, doubts: list[Doubt]) -> int:
    """Start of an answer that would change at `start`; text that `asked` lacks is a part of it.

    The generation prompt may differ from the text before the answer, which is a doubt. It is
    `start` itself where the earlier turns alone, `plain`, do not begin both texts.
    """
    shared = len(os.path.commonprefix([asked, text[:start]]))
    if asked != text[:start]:
        doubts.append(Doubt(OPENED, repr(asked[shared:])))
    return shared if text.startswith(plain) and asked.startswith(plain) else start


def _by_difference(
    row: Record, position: int, renderer: ChatRenderer, text: str
) -> tuple[int, int] | None:
    """Span that changes when another answer takes the place of one; None if more of the chat does.

    This finds answers in templates that render a turn otherwise once another one follows. The end
    token behind it is taken in where the template writes it behind the last turn of a chat, too.
    """
    messages = row["messages"]
    other = {"role": ASSISTANT, "content": _OTHER}
    changed = _render(renderer, row, [*messages[:position], other, *messages[position + 1 :]])
    if changed.count(_OTHER) != 1:
        return None
    start = len(os.path.commonprefix([text, changed]))
    behind = changed[changed.index(_OTHER) + len(_OTHER) :]
    end = len(text) - len(behind)
    if changed[start] != _OTHER or end <= start or not text.endswith(behind):
        return None
    last = _render(renderer, row, [*messages[:position], other])
    tail = last[last.rindex(_OTHER) + len(_OTHER) :]
    return start, end + _end_token(behind, tail, renderer)


def _end_token(behind: str, tail: str, renderer: ChatRenderer) -> int:
    """Characters up to the end of a token that both texts begin with, 0 where there is none."""
    space = len(behind) - len(behind.lstrip())
    # of both kinds of tokenizer, and not of the class above them
    tokens = getattr(renderer.tokenizer, "get_added_vocab")()  # noqa: B009
    for token in sorted(tokens, key=len, reverse=True):
        if behind[space:].startswith(token) and tail.lstrip().startswith(token):
            return space + len(token)
    return 0


def _render(
    renderer: ChatRenderer,
    row: Record,
    messages: Sequence[Record],
    prompt: bool = False,
) -> str:
    return renderer.render(messages, row.get("tools"), prompt, **row.get(TEMPLATE, {}))
