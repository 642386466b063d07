"""Replies in the JSON of the OpenAI API, whole or as events of a stream."""

import json
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

from mambactl.serving.answer_text import Piece, TokenLikely
from mambactl.serving.tool_calls import ToolCall

DONE = b"data: [DONE]\n\n"
# stands for a text where an event is prepared
SLOT = "\ue000"
_ENCODER = json.JSONEncoder(ensure_ascii=False)


@dataclass(frozen=True)
class Usage:
    """Tokens of the prompts and of all answers; of the prompts, those that were known."""

    prompt: int
    completion: int

    def content(self) -> dict[str, int]:
        """The numbers as clients read them."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
        }


@dataclass
class Answer:
    """A whole answer."""

    text: str = ""
    likely: list[TokenLikely] = field(default_factory=list)
    calls: list[ToolCall] = field(default_factory=list)
    finish: str = ""


class ReplyFormat(ABC):
    """The JSON of one route; a reply has an object of its own."""

    prefix = ""
    kinds = ("", "")

    def __init__(self, model: str, likely: bool):
        self.likely = likely
        self._head = {
            "id": f"{self.prefix}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model,
        }
        # by the index of an answer: an event with nothing but a text, in front of it and behind it
        self._around: dict[int, tuple[bytes, bytes]] = {}

    @abstractmethod
    def whole(self, answers: Sequence[Answer], usage: Usage) -> dict[str, object]:
        """The reply with every answer."""

    @abstractmethod
    def opening(self, index: int) -> dict[str, object] | None:
        """The event in front of an answer's text, if there is one."""

    @abstractmethod
    def event(self, index: int, piece: Piece, calls: Sequence[ToolCall]) -> dict[str, object]:
        """The event with a piece of an answer."""

    def sent(self, index: int, piece: Piece, calls: Sequence[ToolCall]) -> bytes:
        """The event with a piece of an answer, as it is sent."""
        if not piece.text or piece.likely or piece.finish is not None:
            return sent_event(self.event(index, piece, calls))
        if index not in self._around:
            event = sent_event(self.event(index, Piece(SLOT), ()))
            before, _, after = event.partition(_ENCODER.encode(SLOT).encode())
            self._around[index] = before, after
        before, after = self._around[index]
        return before + _ENCODER.encode(piece.text).encode() + after

    def usage(self, usage: Usage) -> dict[str, object]:
        """The event with the numbers of tokens."""
        return self._event([]) | {"usage": usage.content()}

    def _event(self, choices: list[dict[str, object]]) -> dict[str, object]:
        return {**self._head, "object": self.kinds[1], "choices": choices}

    def _whole(self, choices: list[dict[str, object]], usage: Usage) -> dict[str, object]:
        return {**self._head, "object": self.kinds[0], "choices": choices, "usage": usage.content()}


class ChatFormat(ReplyFormat):
    """Replies of /v1/chat/completions."""

    prefix = "chatcmpl"
    kinds = ("chat.completion", "chat.completion.chunk")

    def whole(self, answers: Sequence[Answer], usage: Usage) -> dict[str, object]:
        """The reply with every answer."""
        return self._whole([self._choice(i, each) for i, each in enumerate(answers)], usage)

    def opening(self, index: int) -> dict[str, object]:
        """The event that says who writes."""
        return self._delta(index, {"role": "assistant", "content": ""}, None, [])

    def event(self, index: int, piece: Piece, calls: Sequence[ToolCall]) -> dict[str, object]:
        """The event with a piece of an answer."""
        delta: dict[str, object] = {"content": piece.text} if piece.text else {}
        if calls:
            delta["tool_calls"] = [call.content(number) for number, call in enumerate(calls)]
        return self._delta(index, delta, piece.finish, piece.likely)

    def _choice(self, index: int, answer: Answer) -> dict[str, object]:
        message: dict[str, object] = {"role": "assistant", "content": answer.text, "refusal": None}
        if answer.calls:
            message["content"] = answer.text or None
            message["tool_calls"] = [call.content() for call in answer.calls]
        return {
            "index": index,
            "message": message,
            "logprobs": self._logprobs(answer.likely),
            "finish_reason": answer.finish,
        }

    def _delta(
        self, index: int, delta: dict[str, object], finish: str | None, likely: list[TokenLikely]
    ) -> dict[str, object]:
        logprobs = self._logprobs(likely) if likely else None
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return self._event([choice])

    def _logprobs(self, likely: list[TokenLikely]) -> dict[str, object] | None:
        if not self.likely:
            return None
        content = [
            _entry(each.token, each.logprob)
            | {"top_logprobs": [_entry(token, value) for token, value in each.top]}
            for each in likely
        ]
        return {"content": content, "refusal": None}


class CompletionFormat(ReplyFormat):
    """Replies of /v1/completions."""

    prefix = "cmpl"
    kinds = ("text_completion", "text_completion")

    def __init__(self, model: str, likely: bool):
        super().__init__(model, likely)
        self._offsets: dict[int, int] = {}

    def whole(self, answers: Sequence[Answer], usage: Usage) -> dict[str, object]:
        """The reply with every answer."""
        choices = [
            self._choice(i, each.text, each.likely, each.finish) for i, each in enumerate(answers)
        ]
        return self._whole(choices, usage)

    def opening(self, index: int) -> None:
        """Return None: nothing stands in front of a text."""
        return None

    def event(self, index: int, piece: Piece, calls: Sequence[ToolCall]) -> dict[str, object]:
        """The event with a piece of an answer."""
        return self._event([self._choice(index, piece.text, piece.likely, piece.finish)])

    def _choice(
        self, index: int, text: str, likely: list[TokenLikely], finish: str | None
    ) -> dict[str, object]:
        logprobs = self._logprobs(index, likely) if self.likely else None
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}

    def _logprobs(self, index: int, likely: list[TokenLikely]) -> dict[str, object]:
        offsets, at = [], self._offsets.get(index, 0)
        for each in likely:
            offsets.append(at)
            at += len(each.token)
        self._offsets[index] = at
        return {
            "tokens": [each.token for each in likely],
            "token_logprobs": [each.logprob for each in likely],
            "top_logprobs": [dict(each.top) | {each.token: each.logprob} for each in likely],
            "text_offset": offsets,
        }


def sent_event(content: dict[str, object]) -> bytes:
    """An event of a stream."""
    return b"data: " + _ENCODER.encode(content).encode() + b"\n\n"


def _entry(token: str, logprob: float) -> dict[str, object]:
    # a half of a character is no text, whatever the token
    return {"token": token, "logprob": logprob, "bytes": list(token.encode("utf-8", "replace"))}
