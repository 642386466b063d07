"""The turns of a chat in every spelling, brought into that of chat templates.

That is a list of objects with `role`, `content` and perhaps `tool_calls`. Read are also ShareGPT's
`from` and `value`, content in parts of text, JSON text in place of a list, calls in the form of
`function_call`, and arguments of calls as JSON text.
"""

import json
import reprlib
from collections.abc import Sequence
from typing import TypeGuard

from mambactl.data.bad_rows import MALFORMED
from mambactl.foreign import json_value, reason
from mambactl.json_values import AnyObject, Json, JsonObject

Row = JsonObject
Record = AnyObject

SYSTEM, USER, ASSISTANT, TOOL = "system", "user", "assistant", "tool"
# those of other names are a template's own, which is asked for them
ROLES = (SYSTEM, USER, ASSISTANT, TOOL, "developer", "ipython", "function")
# ShareGPT's names, and those of the programs that write such files
SHAREGPT_ROLES = {
    "human": USER,
    "gpt": ASSISTANT,
    "chatgpt": ASSISTANT,
    "bing": ASSISTANT,
    "bard": ASSISTANT,
    "model": ASSISTANT,
    "observation": TOOL,
    "function_response": TOOL,
    "tool_response": TOOL,
}
CALL_ROLES = ("function_call", "tool_call")
TEXT_PARTS = ("text", "input_text", "output_text")
# what JSON calls the values that it holds
JSON_NAMES = {
    "NoneType": "null",
    "bool": "boolean",
    "int": "number",
    "float": "number",
    "str": "string",
    "dict": "object",
}
# how a turn says that nothing is learned of it
MARKS = ("weight", "train", "training")


def json_name(value: object) -> str:
    """Name of the type of a value, as JSON has it."""
    name = type(value).__name__
    return JSON_NAMES.get(name, name)


class BadRow(Exception):
    """Fault of one row, its kind and the remedy; the caller adds the place."""

    def __init__(self, problem: str, kind: str = MALFORMED, cure: str | None = None):
        super().__init__(problem)
        self.kind, self.cure = kind, cure


def require(condition: bool, problem: str) -> None:
    """Raise BadRow unless a condition holds."""
    if not condition:
        raise BadRow(problem)


def turns_of(value: object, column: str, single: bool = False) -> list[Row]:
    """The turns in a column, or the `single` one; raises BadRow that says what is wrong."""
    if isinstance(value, str):
        value = _from_json(value, column)
    if single and isinstance(value, dict):
        value = [value]
    if not isinstance(value, list) or not value:
        raise BadRow(f"`{column}` is not a filled list")
    return [_turn(message, f"`{column}[{position}]`") for position, message in enumerate(value)]


def is_turns(value: object) -> bool:
    """True if a column holds turns: a list of objects or one, also as JSON text."""
    if isinstance(value, str):
        if not value.lstrip().startswith(("[{", "[ {")):
            return False
        try:
            value = json_value(value)
        except ValueError:
            return False
        return isinstance(value, list) and all(map(_has_role, value)) and bool(value)
    return isinstance(value, list) or _has_role(value)


def _has_role(message: object) -> bool:
    return isinstance(message, dict) and bool({"role", "from"} & message.keys())


def _from_json(text: str, column: str) -> Json:
    try:
        return json_value(text)
    except ValueError as error:
        raise BadRow(f"`{column}` is text and not JSON ({reason(error)})") from None


def _turn(message: object, where: str) -> Row:
    if not isinstance(message, dict):
        raise BadRow(f"{where} is not an object")
    # parquet fills absent struct fields with nulls, which chat templates would print
    turn = {key: item for key, item in message.items() if item is not None}
    if "role" not in turn and "from" in turn:
        turn = _from_sharegpt(turn, where)
    role = turn.get("role")
    require(isinstance(role, str) and bool(role), f"{where} has the role {reprlib.repr(role)}")
    if isinstance(turn.get("content"), list):
        turn["content"] = _joined(turn["content"], where)
    if "function_call" in turn and "tool_calls" not in turn:
        turn["tool_calls"] = [{"type": "function", "function": turn.pop("function_call")}]
    content, calls = turn.get("content"), turn.get("tool_calls")
    require(content is not None or bool(calls), f"{where} has no `content`")
    found = json_name(content)
    require(isinstance(content, str | None), f"{where} has a {found} as `content`")
    require(calls is None or are_objects(calls), f"{where}: `tool_calls` are no objects")
    if calls:
        turn["tool_calls"] = [_call(call) for call in calls]
    return turn


def _from_sharegpt(message: Row, where: str) -> Row:
    turn = dict(message)
    role, content = turn.pop("from"), turn.pop("value", None)
    if role in CALL_ROLES:
        require(isinstance(content, str), f"{where} has no text as `value`")
        calls = _from_json(content, f"{where} `value`")
        calls = calls if isinstance(calls, list) else [calls]
        if not are_objects(calls):
            raise BadRow(f"{where} holds no call of a function")
        wrapped = [call if "function" in call else {"function": call} for call in calls]
        return {
            **turn,
            "role": ASSISTANT,
            "tool_calls": [{"type": "function"} | c for c in wrapped],
        }
    turn["role"] = SHAREGPT_ROLES.get(role, role) if isinstance(role, str) else role
    return turn if content is None else {**turn, "content": content}


def _joined(parts: Sequence[object], where: str) -> str:
    """The text of content in parts; other parts are refused by name."""
    texts = []
    for part in parts:
        if isinstance(part, str):
            texts.append(part)
            continue
        if not isinstance(part, dict):
            raise BadRow(f"{where} has a part that is a {json_name(part)}")
        kind = part.get("type", "text" if isinstance(part.get("text"), str) else None)
        require(
            kind in TEXT_PARTS and isinstance(part.get("text"), str),
            f"{where} has a part of the type {reprlib.repr(kind)}, and only text is read",
        )
        texts.append(part["text"])
    return "".join(texts)


def _call(call: Row) -> Row:
    """A call whose arguments, if they are an object in JSON text, are that object."""
    function = call.get("function", call)
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json_value(function["arguments"])
    except ValueError:
        return call
    if not isinstance(arguments, dict):
        return call
    function = {**function, "arguments": arguments}
    return {**call, "function": function} if "function" in call else function


def calls_of(turn: Record) -> list[Row]:
    """Functions that a turn calls, each with its name and arguments."""
    calls = (call.get("function", call) for call in turn.get("tool_calls") or ())
    return [call for call in calls if isinstance(call, dict)]


def with_text_arguments(turns: Sequence[Record]) -> list[Row]:
    """The turns with the arguments of calls as JSON text, which some templates take."""
    return [
        {**turn, "tool_calls": [_as_text(call) for call in turn["tool_calls"]]}
        if turn.get("tool_calls")
        else dict(turn)
        for turn in turns
    ]


def _as_text(call: Row) -> Row:
    function = call.get("function", call)
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), dict):
        return call
    text = json.dumps(function["arguments"], ensure_ascii=False)
    function = {**function, "arguments": text}
    return {**call, "function": function} if "function" in call else function


def learned_turns(turns: Sequence[Row], first: int = 0) -> list[int] | None:
    """Positions of the turns that are learned, from `first` on; None where marks change nothing.

    Takes the marks out of the turns. Raises BadRow for a mark that is neither yes nor no.
    """
    marks = [_mark(turn, position) for position, turn in enumerate(turns)]
    if first == 0 and not any(mark is False for mark in marks):
        return None
    answers = [n for n, turn in enumerate(turns) if turn["role"] == ASSISTANT and n >= first]
    return [n for n in answers if marks[n] is not False]


def _mark(turn: Row, position: int) -> bool | None:
    """Remove the marks of a turn; True if they say that it is learned, None without any."""
    found = None
    for name in MARKS:
        if name not in turn:
            continue
        value = turn.pop(name)
        require(
            value in (0, 1, True, False) and isinstance(value, int | float),
            f"turn {position + 1} has the `{name}` {reprlib.repr(value)}; 0 and 1 are understood",
        )
        require(
            not value or turn["role"] == ASSISTANT or name == "weight",
            f"turn {position + 1}, of the {turn['role']}, is marked to be learned",
        )
        found = bool(value) and found is not False
    return found


def are_objects(value: object) -> TypeGuard[list[Row]]:
    """True if a value is a list of objects."""
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)
