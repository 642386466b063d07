"""Chats rendered by a template that a stranger wrote: in a process of its own, within bounds.

A template is a program: it can loop for ever, or build gigabytes in one operation that no other
thread can interrupt. So a forked process renders, and the system ends it at a bound.
"""

import gc
import json
import multiprocessing
import os
import re
import resource
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import date, datetime, time, tzinfo
from multiprocessing.connection import Connection
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, cast

from mambactl.bounds import MIB, TEMPLATE_BYTES, TEMPLATE_SECONDS, Bound
from mambactl.data.turns import ROLES, Record, Row, calls_of, with_text_arguments
from mambactl.errors import ResourceError, UsageError
from mambactl.foreign import blamed, reason
from mambactl.present import present

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = Record

# how a template asks for the date
DATE = "strftime_now"
# of several templates: for chats without tools, and with them
CHOSEN_TEMPLATES = ("default", "tool_use")
GENERATION = re.compile(r"\{%-?\s*generation\b")

# memory of the rendering process beyond what it starts with: a text of TEMPLATE_BYTES is held as
# pieces, as characters of up to 4 bytes and as UTF-8
_MEMORY = 512 * MIB
# a fork of a process with threads can hang; rendering itself never waits for anything
_SECONDS_WITHOUT_ANSWER = 300
_STATM = Path("/proc/self/statm")
_HINT = "use another chat template, or a checkpoint that you trust"


class TemplateStopped(UsageError):
    """A template went beyond a bound: no row of the set is worth another try."""

    def at(self, where: str) -> "TemplateStopped":
        """Copy of the error that names the row `where`."""
        return TemplateStopped(f"{where}: {self}", self.hint)


class _Request(NamedTuple):
    """A chat, with keywords of the tokenizer's `apply_chat_template`; or its generated spans.

    With `calls` arguments of calls are tried as an object first, and as JSON text then.
    """

    messages: Sequence[Message]
    options: Row
    spans: bool = False
    calls: bool = False


class _Answer(NamedTuple):
    """Outcome of rendering a chat: its text or spans, a refusal, or that memory ran out."""

    found: str | list[tuple[int, int]] | None = None
    refusal: str = ""
    beyond: bool = False


class ChatRenderer:
    """The chat template of a tokenizer, at work in a process of its own.

    `day` is what templates take for today; without one it is the day when the renderer was made.
    The process starts with the first chat and ends with the `with` block around all of them.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", day: date | None = None):
        self.tokenizer, self.day = tokenizer, day or date.today()
        self._process: ForkProcess | None = None
        self._connection: Connection | None = None

    def __enter__(self) -> "ChatRenderer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Message] | None = None,
        prompt: bool = False,
        **options: object,
    ) -> str:
        """The text of a chat; with `prompt`, up to where the assistant writes.

        `options` are those of `apply_chat_template`. Raises UsageError without a template and for
        messages that it refuses, TemplateStopped beyond a bound.
        """
        self._require_roles(messages, tools)
        given = {"tools": tools, "add_generation_prompt": prompt, **options}
        found = self._ask(_Request(messages, given, calls=_has_arguments(messages)))
        if not isinstance(found, str):
            raise TypeError("a chat was rendered as spans")
        return found

    def _require_roles(self, messages: Sequence[Message], tools: Sequence[Message] | None) -> None:
        """Raise UsageError for a role that is unusual and that the template does not name."""
        for role in {message["role"] for message in messages}.difference(ROLES):
            source = self.source(tools)
            if f"'{role}'" not in source and f'"{role}"' not in source:
                known = f"known are {', '.join(ROLES)}"
                problem = f"has the role {role!r}, which the chat template does not name"
                raise UsageError(f"{problem}; {known}", "correct the data")

    def source(self, tools: Sequence[Message] | None = None) -> str:
        """The template for chats with or without tools; UsageError where there is none for them."""
        require_template(self.tokenizer)
        with blamed("the chat template", kind=UsageError, hint=_HINT):
            return self.tokenizer.get_chat_template(None, _list(tools))

    def marks(self, tools: Sequence[Message] | None = None) -> bool:
        """True if the template marks what the assistant writes."""
        return GENERATION.search(self.source(tools)) is not None

    def spans(
        self,
        messages: Sequence[Message],
        tools: Sequence[Message] | None = None,
        **options: object,
    ) -> list[tuple[int, int]]:
        """Character spans [start, end) between the generation markers of the template."""
        given = {"tools": tools, **options}
        found = self._ask(_Request(messages, given, spans=True, calls=_has_arguments(messages)))
        if isinstance(found, str):
            raise TypeError("a chat was rendered as text")
        return found

    def close(self) -> None:
        """End the process; the next chat starts another."""
        if self._process is None or self._connection is None:
            return
        self._connection.close()
        self._process.kill()
        self._process.join()
        self._process.close()
        self._process = self._connection = None

    def start(self) -> None:
        """Start the process, if it is not there; UsageError without a template."""
        require_template(self.tokenizer)
        if self._connection is None:
            self._start()

    def _ask(self, request: _Request) -> str | list[tuple[int, int]]:
        self.start()
        try:
            present(self._connection).send(request)
        except RecursionError:
            raise UsageError("the chat template refuses the messages (nested too deeply)") from None
        except OSError:
            # it ended: what remains to be read says why
            pass
        answer = self._answer()
        if answer.beyond:
            raise _stopped(TEMPLATE_BYTES)
        if answer.found is None:
            raise UsageError(f"the chat template refuses the messages ({answer.refusal})")
        return answer.found

    def _start(self) -> None:
        # once here, not in every process anew
        import transformers.utils.chat_template_utils  # noqa: F401

        context = multiprocessing.get_context("fork")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve,
            args=(self.tokenizer, theirs, self.day),
            name="chat template",
            daemon=True,
        )
        try:
            with _quiet_tokenizers():
                self._process.start()
        except OSError as error:
            self._process = self._connection = None
            raise ResourceError(
                f"cannot start a process for the chat template ({error.strerror})",
                "free some memory, or end other processes",
            ) from error
        finally:
            theirs.close()

    def _answer(self) -> _Answer:
        connection, process = present(self._connection), present(self._process)
        try:
            if connection.poll(_SECONDS_WITHOUT_ANSWER):
                return connection.recv()
        except (EOFError, OSError):
            process.join()
            code = process.exitcode
            self.close()
            if code == -signal.SIGPROF:
                raise _stopped(TEMPLATE_SECONDS) from None
            raise TemplateStopped(f"the chat template ends its process ({code})", _HINT) from None
        self.close()
        raise ResourceError(f"no chat was rendered in {_SECONDS_WITHOUT_ANSWER} s", "try it again")


def render_chat(
    tokenizer: "PreTrainedTokenizerBase",
    messages: Sequence[Message],
    tools: Sequence[Message] | None = None,
    prompt: bool = False,
) -> str:
    """One chat by itself, as `ChatRenderer.render` does; several are cheaper with one renderer."""
    with ChatRenderer(tokenizer) as renderer:
        return renderer.render(messages, tools, prompt)


def require_template(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Raise UsageError for a tokenizer without a chat template."""
    if not getattr(tokenizer, "chat_template", None):
        raise UsageError(
            "the tokenizer has no chat template, so `messages` cannot be rendered",
            "use rows with `text`, or a checkpoint whose tokenizer has a template",
        )


def unused_templates(tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    """Templates by names that rendering chooses for no chat."""
    templates = getattr(tokenizer, "chat_template", None)
    named = templates.keys() if isinstance(templates, Mapping) else ()
    return sorted(set(named) - set(CHOSEN_TEMPLATES))


def prints_date(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """True if a chat template asks for the date."""
    return DATE in str(getattr(tokenizer, "chat_template", None))


def _stopped(bound: Bound) -> TemplateStopped:
    return TemplateStopped(
        f"the chat template takes more than {bound}, the most for {bound.of}", _HINT
    )


@contextmanager
def _quiet_tokenizers() -> Iterator[None]:
    """Silence the library's warning of every fork: the new process tokenises nothing."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = before or "true"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]


def _serve(tokenizer: "PreTrainedTokenizerBase", connection: Connection, day: date) -> None:
    """Answer until the other end is closed, or the system ends the process at a bound."""
    _confine(connection)
    _stop_clock(day)
    while True:
        try:
            request = connection.recv()
        except EOFError:
            # nothing of the parent process, whose copy this is, may run its finalizers
            os._exit(0)
        signal.setitimer(signal.ITIMER_PROF, TEMPLATE_SECONDS.most)
        answer = _render(tokenizer, request)
        signal.setitimer(signal.ITIMER_PROF, 0)
        connection.send(answer)


def _confine(connection: Connection) -> None:
    """Close inherited files, reset signals, and bound the memory of this process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for name in (signal.SIGTERM, signal.SIGPROF):
        signal.signal(name, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGPROF})
    # locks and pipes of the parent must end with the parent
    os.closerange(3, connection.fileno())
    os.closerange(connection.fileno() + 1, os.sysconf("SC_OPEN_MAX"))
    # what was there before stays: collecting it would copy its pages, or end what is not ours
    gc.freeze()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if _STATM.exists():
        size = int(_STATM.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + _MEMORY, size + _MEMORY))


def _stop_clock(day: date) -> None:
    """Set the time that templates ask for, in this process alone, to midnight of `day`."""
    from transformers.utils import chat_template_utils

    class Stopped(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> "Stopped":
            return cls.combine(day, time(), tz)

    chat_template_utils.datetime = Stopped  # pyright: ignore[reportPrivateImportUsage]


def _has_arguments(messages: Sequence[Message]) -> bool:
    return any(calls_of(message) for message in messages)


def _render(tokenizer: "PreTrainedTokenizerBase", request: _Request) -> _Answer:
    if request.calls:
        answer = _try_arguments(tokenizer, request)
        if answer is not None:
            return answer
        request = request._replace(messages=with_text_arguments(request.messages))
    return _rendered(tokenizer, request)


def _try_arguments(tokenizer: "PreTrainedTokenizerBase", request: _Request) -> _Answer | None:
    """The rendering of arguments that are objects; None where they have to be JSON text.

    That is in templates that refuse objects, or write them as Python does.
    """
    text = _rendered(tokenizer, request._replace(spans=False))
    if text.beyond or (isinstance(text.found, str) and not _in_python(text.found, request)):
        return _rendered(tokenizer, request) if request.spans else text
    other = request._replace(spans=False, messages=with_text_arguments(request.messages))
    return text if _rendered(tokenizer, other).found is None else None


def _in_python(text: str, request: _Request) -> bool:
    """True if arguments stand in a text in Python's own notation, and not as JSON."""
    arguments = [
        call["arguments"]
        for message in request.messages
        for call in calls_of(message)
        if isinstance(call.get("arguments"), dict) and call["arguments"]
    ]
    return any(repr(each) in text and repr(each) != json.dumps(each) for each in arguments)


def _rendered(tokenizer: "PreTrainedTokenizerBase", request: _Request) -> _Answer:
    try:
        found = _spans(tokenizer, request) if request.spans else _text(tokenizer, request)
        beyond = isinstance(found, str) and len(found.encode("utf-8")) > TEMPLATE_BYTES.most
    except MemoryError:
        return _Answer(beyond=True)
    except Exception as error:  # templates raise what they like
        return _Answer(refusal=reason(error))
    return _Answer(beyond=True) if beyond else _Answer(found)


def _text(tokenizer: "PreTrainedTokenizerBase", request: _Request) -> str:
    messages = [dict(message) for message in request.messages]
    # text is what it returns where nothing is tokenized
    return cast(str, tokenizer.apply_chat_template(messages, tokenize=False, **request.options))


def _list(tools: Sequence[Message] | None) -> list[Row] | None:
    return None if tools is None else [dict(tool) for tool in tools]


def _spans(tokenizer: "PreTrainedTokenizerBase", request: _Request) -> list[tuple[int, int]]:
    from transformers.utils.chat_template_utils import render_jinja_template

    options = dict(request.options)
    tools = options.pop("tools")
    _, (spans,) = render_jinja_template(
        [[dict(message) for message in request.messages]],
        tools,
        chat_template=tokenizer.get_chat_template(None, tools),
        return_assistant_tokens_mask=True,
        **{**tokenizer.special_tokens_map, **options},
    )
    # its annotation says what it returns without the mask
    return cast(list[tuple[int, int]], spans)
