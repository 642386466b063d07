"""Calls of tools in what a model wrote: as the common chat templates teach models to write them.

`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, once or several times, or the object,
or a list of objects, as the whole text (with `parameters` for `arguments` as well).
"""

import json
import re
import secrets
from collections.abc import Collection
from dataclasses import dataclass

OPEN, CLOSE = "<tool_call>", "</tool_call>"
_MARKED = re.compile(rf"{OPEN}(.*?)(?:{CLOSE}|$)", re.DOTALL)
_BARE = ("{", "[")


@dataclass(frozen=True)
class ToolCall:
    """A call that a model asks for; its arguments are JSON."""

    name: str
    arguments: str

    def content(self, index: int | None = None) -> dict[str, object]:
        """The call as clients read it; with its index in a stream."""
        numbered = {} if index is None else {"index": index}
        function = {"name": self.name, "arguments": self.arguments}
        call = {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}
        return {**numbered, **call}


class ToolText:
    """A text that may hold calls of tools: what may become one is held back to the end."""

    def __init__(self, names: Collection[str]):
        self.names = names
        self._held = ""
        self._begun = False

    def add(self, text: str) -> str:
        """Take more text; return what of it, and of the text held back, is certainly no call."""
        if not self.names:
            return text
        self._held += text
        start = self._start()
        given, self._held = self._held[:start], self._held[start:]
        self._begun |= bool(given.strip())
        return given

    def finish(self) -> tuple[str, list[ToolCall]]:
        """The rest of the text, and the calls."""
        text, self._held = self._held, ""
        marked = _MARKED.findall(text)
        calls = [call for part in marked or [text] for call in _calls(part, self.names)]
        if not calls or (not marked and self._begun):
            return text, []
        return (_MARKED.sub("", text).strip() if marked else ""), calls

    def _start(self) -> int:
        """Index in the held text at which a call may begin; its length if there is none."""
        stripped = self._held.lstrip()
        if not self._begun and (not stripped or stripped.startswith(_BARE)):
            return 0
        found = self._held.find(OPEN)
        if found >= 0:
            return found
        sizes = range(min(len(OPEN) - 1, len(self._held)), 0, -1)
        begun = next((size for size in sizes if self._held.endswith(OPEN[:size])), 0)
        return len(self._held) - begun


def _calls(text: str, names: Collection[str]) -> list[ToolCall]:
    """The calls in a JSON text; none where anything in it is no call of a known tool."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return []
    found = []
    for each in content if isinstance(content, list) else [content]:
        if not isinstance(each, dict) or each.get("name") not in names:
            return []
        arguments = each.get("arguments", each.get("parameters", {}))
        if not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        found.append(ToolCall(each["name"], arguments))
    return found
