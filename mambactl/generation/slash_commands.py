"""Commands on a conversation: typed lines that begin with a slash."""

import re
from collections.abc import Callable
from dataclasses import dataclass

from mambactl.errors import UsageError
from mambactl.generation import saved_dialogue
from mambactl.generation.dialogue import Chat
from mambactl.options.fields import nearest

# the file where none is named
DEFAULT = "chat.safetensors"
_COMMAND = re.compile(r"/([A-Za-z]+)(?:\s+(.*\S))?\s*", re.DOTALL)


class WrongCommand(UsageError):
    """A line that begins like a command and is none; nothing was done."""


@dataclass(frozen=True)
class SlashCommand:
    """A line `/name argument`; `run` returns what is to be said about it."""

    help: str
    run: Callable[[Chat, str | None], str]
    argument: str = ""


def _reset(chat: Chat, argument: str | None) -> str:
    chat.reset()
    return "a new conversation"


def _system(chat: Chat, argument: str | None) -> str:
    if argument is not None:
        chat.system = argument
        return "the system message is set; what was said so far stays"
    return f"system: {chat.system}" if chat.system else "there is no system message"


def _stats(chat: Chat, argument: str | None) -> str:
    return chat.describe()


def _save(chat: Chat, argument: str | None) -> str:
    saved_dialogue.save(chat, argument or DEFAULT)
    return f"saved in {argument or DEFAULT}"


def _load(chat: Chat, argument: str | None) -> str:
    saved_dialogue.load(chat, argument or DEFAULT)
    return f"{len(chat.messages)} messages from {argument or DEFAULT}"


def _help(chat: Chat, argument: str | None) -> str:
    return listed()


def listed() -> str:
    """The commands with their arguments and what they do, a line for each."""
    typed = {f"/{name} {row.argument}".rstrip(): row.help for name, row in SLASH_COMMANDS.items()}
    width = max(map(len, typed))
    return "\n".join(f"{words:<{width}}  {text}" for words, text in typed.items())


SLASH_COMMANDS = {
    "help": SlashCommand("these lines", _help),
    "reset": SlashCommand("forget what was said, but for the system message", _reset),
    "system": SlashCommand("set the system message, or show it", _system, "[TEXT]"),
    "save": SlashCommand("keep the conversation in a file", _save, "[FILE]"),
    "load": SlashCommand("go on with a conversation of a file", _load, "[FILE]"),
    "stats": SlashCommand("speed, acceptance, what was read again, bytes of the cache", _stats),
}


def obeyed(chat: Chat, line: str) -> str | None:
    """Run a line that is a command and return its reply; None if it is a message.

    Raises WrongCommand for a command that there is not, or not with an argument. A word with a
    slash inside is no command.
    """
    match = _COMMAND.fullmatch(line)
    if match is None:
        return None
    name, argument = match.groups()
    row = SLASH_COMMANDS.get(name)
    if row is None:
        raise WrongCommand(
            f"there is no /{name}", nearest(f"/{name.lower()}", map("/{}".format, SLASH_COMMANDS))
        )
    if argument is not None and not row.argument:
        raise WrongCommand(
            f"/{name} takes no argument", f"/{name} alone, or a space before the slash"
        )
    return row.run(chat, argument)
