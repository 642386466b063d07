"""`chat`: a conversation in a terminal, or an answer for every line of stdin."""

import os
import sys
from collections.abc import Iterable, Iterator

from mambactl import console
from mambactl.errors import MambactlError, UsageError
from mambactl.generation import decoding
from mambactl.generation.chat_terminal import attended, editor, stoppable, typed_lines
from mambactl.generation.dialogue import Answer, Chat
from mambactl.generation.slash_commands import SLASH_COMMANDS, WrongCommand, listed, obeyed
from mambactl.json_values import JsonObject
from mambactl.options import ChatConfig
from mambactl.stage_result import StageResult

GREETING = "Ctrl-C stops an answer, Ctrl-D ends, /help says more"
STDERR = 2


def run(config: ChatConfig, source: str) -> StageResult:
    """Answer what is typed, or every line of stdin, until it ends.

    Without a terminal a line that cannot be answered or obeyed ends it, with its number in the
    error. A wrong command does not: the lines behind it are answered first.
    """
    descriptor = console.text_descriptor()
    # what is missing for it shows before a model is loaded
    session = editor(SLASH_COMMANDS) if attended() else None
    with Chat.open(config, source) as chat:
        if session is not None:
            console.log(GREETING)
            _talk(chat, typed_lines(session), descriptor)
        else:
            try:
                _answer_lines(chat, descriptor)
            except MambactlError as error:
                error.made = {"answers": [answer.text for answer in chat.answers]}
                raise
        said = chat.total()
        metrics = said.as_dict() | {
            "answers": [answer.text for answer in chat.answers],
            "finish": [answer.finish for answer in chat.answers],
            "messages": chat.messages,
            "cache_bytes": chat.cache_bytes(),
        }
    if said.tokens:
        console.log(decoding.summary(said))
    lines = [one_line(answer.text) for answer in chat.answers]
    # one object holds the answers already
    text = None if descriptor is None else "\n".join(lines)
    return StageResult(source, metrics, text, written=descriptor is not None)


def plan(config: ChatConfig, source: str) -> JsonObject:
    """Dry run: the models that would answer."""
    return decoding.plan_models(config, source) | {"new_tokens_at_most": config.max_new_tokens}


def one_line(text: str) -> str:
    r"""Text of several lines as one, with \\ for a backslash and \n for the end of a line.

    `printf %b` undoes it.
    """
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r")


def _answer_lines(chat: Chat, descriptor: int | None) -> None:
    wrong: list[int] = []
    for number, line in enumerate(_stdin_lines(), 1):
        if not line.strip():
            continue
        try:
            said = obeyed(chat, line)
            answer = chat.say(line) if said is None else None
        except WrongCommand as error:
            _tell(error, f"line {number} of stdin: ")
            if not wrong:
                console.log(listed(), level=0)
            wrong.append(number)
            continue
        except MambactlError as error:
            # lines behind a /load that failed would go on with another conversation
            error.args = (f"line {number} of stdin: {error}",)
            raise
        if answer is None:
            console.log(said or "")
        elif descriptor is not None:
            console.write_out(one_line(answer.text), descriptor)
    if wrong:
        lines = "line" if len(wrong) == 1 else "lines"
        raise UsageError(f"wrong command in {lines} {', '.join(map(str, wrong))} of stdin")
    if not chat.answers:
        raise UsageError("no message arrived on stdin", "printf 'hi\\n' | mambactl chat MODEL")


def _stdin_lines() -> Iterator[str]:
    lines = iter(sys.stdin or ())
    try:
        while True:
            # nothing goes on while somebody else is to speak
            with console.attended():
                line = next(lines, None)
            if line is None:
                return
            # bytes that are no text pass as surrogates
            line.encode()
            yield line.rstrip("\r\n")
    except UnicodeError:
        raise UsageError("a message on stdin is not UTF-8 text", "convert it first") from None


def _talk(chat: Chat, lines: Iterable[str], descriptor: int | None) -> None:
    """Show answers in the terminal as they come, and write them to stdout if that is a file."""
    for line in lines:
        if not line.strip():
            continue
        try:
            said = obeyed(chat, line)
            if said is not None:
                console.log(said, level=0)
                continue
            answer = _shown(chat, line)
        except MambactlError as error:
            _tell(error)
            continue
        if descriptor is not None and not os.isatty(descriptor):
            console.write_out(one_line(answer.text), descriptor)


def _tell(error: MambactlError, where: str = "") -> None:
    hint = f" ({error.hint})" if error.hint else ""
    console.log(f"error: {where}{error}{hint}", level=0)


def _shown(chat: Chat, line: str) -> Answer:
    with stoppable() as stopped, console.attended():
        answer = chat.say(line, lambda piece: console.write_piece(piece, STDERR), stopped)
    console.write_piece(" [stopped]\n" if answer.finish == "stop" else "\n", STDERR)
    return answer
