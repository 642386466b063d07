"""Comparison of a rendered chat with its row, before anything is learned of it."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence

from mambactl.data.doubts import Doubt
from mambactl.data.turns import ASSISTANT, USER, Record, calls_of
from mambactl.errors import UsageError
from mambactl.foreign import excerpt

Span = tuple[int, int]

PARTLY = "the chat template changes or leaves out a part of what turns say"
THOUGHTS = "the chat template leaves out what stands before </think>"
REASONING = "the chat template leaves out the reasoning of the last answer"
DROPPED = "the chat template leaves out whole turns"
NO_TOOLS = "the chat template does not show the tools of the row"
ESCAPED = "the chat template writes arguments of calls as JSON inside of JSON"
OPENED = "the chat template opens answers that are to be written in another way than whole ones"
_THOUGHT_END = "</think>"
_WORD = re.compile(r"\w+")
# of the words of a turn: with fewer in the text it is not the turn that stands there
_LEAST = 0.5
_CURE = "correct the data or the chat template"


class LostTurn(UsageError):
    """Something that a row teaches is not in what the template made of it."""


def compared(row: Record, text: str, spans: Sequence[Span] | None) -> list[Doubt]:
    """Doubts about the rendering `text` of a chat, of which `spans` are learned (None: all).

    Raises LostTurn for an answer, a question or a call that is not there.
    """
    learned = text if spans is None else "".join(text[start:end] for start, end in spans)
    whole, own = _Text(text), _Text(learned)
    taught = row.get("learned")
    found: list[Doubt] = []
    for position, turn in enumerate(row["messages"]):
        answers = turn["role"] == ASSISTANT and (taught is None or position in taught)
        written = own if answers else whole
        found += _said(turn, position, written)
        for call in calls_of(turn):
            found += _called(call, position, written)
    return found + _shown_tools(row, whole) + _reasoned(row["messages"], whole)


class _Text:
    """A text, and its words."""

    def __init__(self, text: str):
        self.text = text
        self.flat = _flat(text)
        self._words: set[str] | None = None

    def has(self, part: str) -> bool:
        """True if `part` occurs in the text, perhaps escaped, whatever its white space."""
        if part in self.text or _flat(part) in self.flat:
            return True
        return any(json.dumps(part, ensure_ascii=a)[1:-1] in self.text for a in (True, False))

    def share(self, part: str) -> float:
        """Fraction of the words of `part` that occur in the text."""
        if self._words is None:
            self._words = set(_WORD.findall(self.text.casefold()))
        words = set(_WORD.findall(part.casefold()))
        return len(words & self._words) / len(words) if words else 0.0


def _flat(text: str) -> str:
    return " ".join(text.split())


def _said(turn: Record, position: int, written: _Text) -> Iterator[Doubt]:
    content = turn.get("content") or ""
    if not content.strip() or written.has(content):
        return
    role = turn["role"]
    where = f"turn {position + 1}, of the {role}: {excerpt(content)[:60]!r}"
    thoughts, end, answer = content.rpartition(_THOUGHT_END)
    if end and answer.strip() and written.has(answer.strip()):
        yield Doubt(THOUGHTS, where)
    elif written.share(content) >= _LEAST:
        yield Doubt(PARTLY, where)
    elif role == USER or (role == ASSISTANT and not turn.get("tool_calls")):
        raise LostTurn(f"the chat template leaves out {where}", _CURE)
    else:
        yield Doubt(DROPPED, where)


def _called(call: Record, position: int, written: _Text) -> Iterator[Doubt]:
    name, arguments = call.get("name"), call.get("arguments")
    if isinstance(name, str) and not written.has(name):
        raise LostTurn(
            f"the chat template leaves out the call of {name!r} in turn {position + 1}", _CURE
        )
    if not isinstance(arguments, Mapping):
        return
    values = [value for value in _leaves(arguments) if value.strip()]
    if values and not any(written.has(value) for value in values):
        problem = f"leaves out the arguments of {name!r} in turn {position + 1}"
        raise LostTurn(f"the chat template {problem}", _CURE)
    if arguments and any(json.dumps(form) in written.text for form in _forms(arguments)):
        yield Doubt(ESCAPED, f"turn {position + 1}, {name!r}")


def _forms(arguments: Record) -> Iterator[str]:
    for separators in ((", ", ": "), (",", ":")):
        yield json.dumps(arguments, separators=separators)


def _leaves(value: object) -> Iterator[str]:
    """Numbers and texts in a value, as JSON writes them."""
    if isinstance(value, Mapping):
        for each in value.values():
            yield from _leaves(each)
    elif isinstance(value, list):
        for each in value:
            yield from _leaves(each)
    else:
        yield value if isinstance(value, str) else json.dumps(value)


def _shown_tools(row: Record, written: _Text) -> list[Doubt]:
    tools = [tool.get("function", tool) for tool in row.get("tools") or ()]
    names = [tool["name"] for tool in tools if isinstance(tool, dict) and "name" in tool]
    names = [name for name in names if isinstance(name, str)]
    if names and not any(written.has(f'"{name}"') or written.has(name) for name in names):
        return [Doubt(NO_TOOLS, ", ".join(names[:3]))]
    return []


def _reasoned(turns: Sequence[Record], written: _Text) -> list[Doubt]:
    """Doubt if the last answer's reasoning is lost; templates drop earlier ones on purpose."""
    last = next((turn for turn in reversed(turns) if turn["role"] == ASSISTANT), {})
    said = [last[name] for name in ("reasoning_content", "thinking", "reasoning") if name in last]
    lost = [
        text for text in said if isinstance(text, str) and text.strip() and not written.has(text)
    ]
    return [Doubt(REASONING)] if lost else []
