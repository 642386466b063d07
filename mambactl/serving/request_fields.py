"""The fields of requests, checked; one that would change an answer and is not known is refused."""

import json
import re
from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal, TypeVar, cast

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    StringConstraints,
    ValidationError,
    model_validator,
)

from mambactl.decode.open_batch import MOST_ALTERNATIVES
from mambactl.json_values import AnyObject, JsonObject
from mambactl.options.fields import Temperature
from mambactl.serving.refusals import Refused

# what fields that are not known may hold, as it changes nothing: clients send some of them always;
# None and empty containers change nothing in any
NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "logit_bias": (),
    "modalities": (["text"],),
    "parallel_tool_calls": (True,),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "top_k": (0, -1),
}
# labels for the client's own use
LABELS = {"metadata", "safety_identifier", "user"}
MOST_CHOICES, MOST_STOPS = 128, 16
# escaped, where pairs of them are characters, or as bytes, which are no UTF-8
SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]|\xed[\xa0-\xbf]")
DEFAULT_COMPLETION_TOKENS = 16

Text = Annotated[str, StringConstraints(min_length=1)]
Positive = Annotated[int, Field(ge=1, strict=True)]
# as far as the API's own go: a 64-bit integer
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63, strict=True)]
Alternatives = Annotated[int, Field(ge=0, le=MOST_ALTERNATIVES, strict=True)]
Token = Annotated[int, Field(strict=True)]
Body = TypeVar("Body", bound="SamplingFields")


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


class StreamOptions(BaseModel):
    """Options of a stream that a client may set."""

    model_config = ConfigDict(extra="forbid")

    include_usage: StrictBool = False


class ToolFunction(BaseModel):
    """A function that the model may ask for; its parameters are the template's to read."""

    model_config = ConfigDict(extra="allow")

    name: Text


class Tool(BaseModel):
    """A tool as the chat template gets it."""

    model_config = ConfigDict(extra="allow")

    type: Literal["function"] = "function"
    function: ToolFunction


class NamedFunction(BaseModel):
    """The function that a client insists on."""

    name: Text


class NamedTool(BaseModel):
    """The tool that a client insists on."""

    type: Literal["function"] = "function"
    function: NamedFunction


class SamplingFields(BaseModel):
    """Fields of every request for text."""

    model_config = ConfigDict(extra="allow", strict=False, allow_inf_nan=False)
    # the field that holds what is asked
    asked_in: ClassVar[str] = "messages"

    model: Text
    max_tokens: Positive | None = None
    temperature: Annotated[Temperature, Field(strict=True)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, strict=True)] | None = None
    seed: Seed | None = None
    stop: Annotated[list[Text] | None, Field(max_length=MOST_STOPS), BeforeValidator(_as_list)] = (
        None
    )
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES, strict=True)] | None = None

    @model_validator(mode="after")
    def _known(self) -> "SamplingFields":
        for name, value in (self.model_extra or {}).items():
            if name in LABELS or value is None or value in ([], {}):
                continue
            if name not in NEUTRAL or value not in NEUTRAL[name]:
                raise _unsupported(name)
        if self.stream_options is not None and not self.stream:
            raise Refused("stream_options goes with stream", param="stream_options")
        return self

    @property
    def most_tokens(self) -> int | None:
        """New tokens of an answer at most, None for as many as there is room for."""
        return self.max_tokens

    @property
    def alternatives(self) -> int | None:
        """Number of likely tokens listed with each token; None without log-probabilities."""
        return None

    @property
    def choices(self) -> int:
        """Number of answers that a prompt gets."""
        return self.n or 1

    @property
    def usage_in_stream(self) -> bool:
        """True if a stream ends with the numbers of tokens."""
        return self.stream_options is not None and self.stream_options.include_usage


class ChatBody(SamplingFields):
    """A request to /v1/chat/completions."""

    messages: Annotated[list[JsonObject], Field(min_length=1)]
    max_completion_tokens: Positive | None = None
    logprobs: StrictBool | None = None
    top_logprobs: Alternatives | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None

    @property
    def most_tokens(self) -> int | None:
        """New tokens of an answer at most, None for as many as there is room for."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def alternatives(self) -> int | None:
        """Number of likely tokens listed with each token; None without log-probabilities."""
        if not self.logprobs:
            if self.top_logprobs:
                raise Refused("top_logprobs goes with logprobs", param="top_logprobs")
            return None
        return self.top_logprobs or 0

    def offered_tools(self) -> list[JsonObject] | None:
        """The tools that the chat template gets: all, the one that is insisted on, or none."""
        choice, tools = self.tool_choice, self.tools or []
        if isinstance(choice, NamedTool):
            tools = [tool for tool in tools if tool.function.name == choice.function.name]
            if not tools:
                raise Refused(f"no tool is called {choice.function.name}", param="tool_choice")
        elif choice == "required" and not tools:
            raise Refused("tool_choice is required, but there are no tools", param="tool_choice")
        if not tools or choice == "none":
            return None
        return [tool.model_dump() for tool in tools]

    def rendered_messages(self) -> tuple[JsonObject, ...]:
        """The messages as chat templates take them: contents are texts, arguments objects."""
        return tuple(_message(number, each) for number, each in enumerate(self.messages))


class CompletionBody(SamplingFields):
    """A request to /v1/completions."""

    asked_in: ClassVar[str] = "prompt"

    prompt: str | list[str] | list[Token] | list[list[Token]]
    logprobs: Alternatives | None = None

    @property
    def most_tokens(self) -> int:
        """New tokens of an answer at most."""
        return self.max_tokens or DEFAULT_COMPLETION_TOKENS

    @property
    def alternatives(self) -> int | None:
        """Number of likely tokens listed with each token; None without log-probabilities."""
        return self.logprobs

    @property
    def prompts(self) -> list[str | list[int]]:
        """List of the prompts, each a text or tokens."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if not self.prompt:
            raise Refused("prompt is empty", param="prompt")
        # all are of the first one's kind
        if isinstance(self.prompt[0], int):
            return [cast(list[int], self.prompt)]
        return list(cast(list[str] | list[list[int]], self.prompt))


def parsed(kind: type[Body], body: bytes) -> Body:
    """A request from JSON; raises Refused, naming the field that is wrong."""
    try:
        content = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refused(f"the body is no JSON: {error}") from None
    if not isinstance(content, dict):
        raise Refused("the body is no JSON object")
    if SURROGATE.search(body):
        _require_unicode(content)
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        name = ".".join(str(part) for part in first["loc"] if not _is_kind(part))
        text = first["msg"].removeprefix("Value error, ")
        reason = text[:1].lower() + text[1:]
        raise Refused(f"{name}: {reason}", param=str(first["loc"][0])) from None


def _require_unicode(content: object) -> None:
    """Raise Refused for text with half of a surrogate pair, which no tokenizer takes."""
    try:
        json.dumps(content, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise Refused("the body holds text that is no Unicode: half of a surrogate pair") from None


def _is_kind(part: int | str) -> bool:
    """True if a part of a field's path names an alternative of a type, not a field."""
    return isinstance(part, str) and not part.isidentifier()


def _unsupported(name: str) -> Refused:
    return Refused(f"{name} is not supported", param=name, code="unsupported_parameter")


def _message(number: int, given: AnyObject) -> JsonObject:
    where = f"messages.{number}"
    if not isinstance(given.get("role"), str):
        raise Refused(f"{where}.role: a message needs a role", param="messages")
    message = {key: value for key, value in given.items() if value is not None}
    message["content"] = _content(where, given.get("content"))
    if calls := message.get("tool_calls"):
        message["tool_calls"] = [_call(where, call) for call in calls]
    return message


def _content(where: str, content: object) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    parts = content if isinstance(content, list) else [content]
    texts = []
    for part in parts:
        if not isinstance(part, dict) or part.get("type") != "text":
            raise Refused(f"{where}.content: only text is supported", param="messages")
        texts.append(str(part.get("text", "")))
    return "".join(texts)


def _call(where: str, call: JsonObject) -> JsonObject:
    """A call that an earlier answer made, with its arguments as an object."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise Refused(f"{where}.tool_calls: a call needs a function's name", param="messages")
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            raise Refused(f"{where}.tool_calls: arguments are no JSON", param="messages") from None
    return {**call, "function": {**function, "arguments": arguments}}
