"""Where the answers of a chat stand in the text that its template makes of it."""

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mambactl.data.chat_template import ChatRenderer
from mambactl.data.doubts import Doubt
from mambactl.data.rendered import OPENED
from mambactl.data.row_forms import TEMPLATE
from mambactl.data.turns import ASSISTANT
from mambactl.errors import UsageError

# an answer that begins as no other does
_OTHER = "\ue000"
REWRITES = "the chat template rewrites earlier turns, so assistant turns cannot be located"


def spans_of(
    row: Mapping[str, Any], renderer: ChatRenderer, text: str, doubts: list[Doubt]
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
    row: Mapping[str, Any],
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
        start = start_of_answer(row, position, renderer, text, doubts)
        through = _render(renderer, row, messages[: position + 1]).rstrip()
        if start is None or not text.startswith(through):
            raise UsageError(REWRITES, "use --no-assistant-only-loss")
        yield start, len(through)


def start_of_answer(
    row: Mapping[str, Any],
    position: int,
    renderer: ChatRenderer,
    text: str,
    doubts: list[Doubt],
) -> int | None:
    """Where the turn at `position` starts in the rendering `text` of a chat; None if nowhere.

    That is where everything before it ends, with what asks the model for an answer. Some templates
    open a block there that whole answers do not begin with: then it is where another answer would
    part from this one.
    """
    if position == 0:
        return 0
    before = row["messages"][:position]
    asked = _render(renderer, row, before, prompt=True)
    if text.startswith(asked):
        return len(asked)
    plain = _render(renderer, row, before)
    if not text.startswith(plain) or not asked.startswith(plain):
        return None
    other = _render(renderer, row, [*before, {"role": ASSISTANT, "content": _OTHER}])
    start = len(os.path.commonprefix([text, other]))
    if start < len(plain) or not asked.startswith(text[:start]):
        return None
    doubts.append(Doubt(OPENED, repr(asked[start:])))
    return start


def _render(
    renderer: ChatRenderer,
    row: Mapping[str, Any],
    messages: Sequence[Mapping[str, Any]],
    prompt: bool = False,
) -> str:
    return renderer.render(messages, row.get("tools"), prompt, **row.get(TEMPLATE, {}))
