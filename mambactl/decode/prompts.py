"""Prompts: a small built-in set, rows of prompt files, and their way to token ids."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import date
from typing import TYPE_CHECKING

from mambactl.data.begin_token import begun_twice
from mambactl.data.chat_template import ChatRenderer, TemplateStopped
from mambactl.data.row_forms import TEMPLATE, TOOLS
from mambactl.data.sources import Document
from mambactl.data.turns import ASSISTANT, USER, Record, Row
from mambactl.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Prompt:
    """Chat turns that end with the user's; a plain text is one turn.

    `template` has further words that the chat template may ask for.
    """

    messages: tuple[Record, ...]
    category: str = ""
    tools: list[Row] | None = None
    template: Record = field(default_factory=dict)

    @classmethod
    def of(cls, text: str, category: str = "") -> "Prompt":
        """A single user turn."""
        return cls(({"role": "user", "content": text},), category)

    @classmethod
    def before_answer(cls, row: Document) -> "Prompt":
        """Turns before the last answer of a row of a chat.

        Raises UsageError where the user says nothing before it.
        """
        turns = list(row["messages"])
        while turns and turns[-1]["role"] == ASSISTANT:
            turns.pop()
        if not any(turn["role"] == USER for turn in turns):
            raise UsageError("has no user turn before the last answer")
        return cls(tuple(turns), tools=row.get(TOOLS), template=row.get(TEMPLATE, {}))


BUILTIN = (
    Prompt.of("What should I look at when I choose my first bicycle?", "chat"),
    Prompt.of("Write a short letter that thanks a neighbour for watering the plants.", "chat"),
    Prompt.of(
        "Write a Python function that returns the second largest number of a list, and explain "
        "what it does with an empty list.",
        "code",
    ),
    Prompt.of(
        "This function should count vowels but always returns zero. Repeat it with the mistake "
        "corrected.\n\ndef count_vowels(text):\n    count = 0\n    for letter in text:\n"
        "        if letter == 'aeiou':\n            count += 1\n    return count",
        "code",
    ),
    Prompt.of(
        "A baker fills 14 trays with 12 rolls each and sells 95 rolls before noon. How many rolls "
        "are left? Show each step.",
        "maths",
    ),
    Prompt.of("List the first ten square numbers and the differences between neighbours.", "maths"),
    Prompt.of(
        "Summarise in two sentences: The old lighthouse was built of grey stone in 1862. For a "
        "hundred years a keeper climbed its 140 steps every evening to light the lamp. In 1963 the "
        "lamp became electric and the last keeper moved to the village, but he kept the key and "
        "still climbed the steps on Sundays to clean the windows.",
        "summary",
    ),
    Prompt.of(
        "Turn this note into three bullet points: We meet on Tuesday instead of Monday because the "
        "hall is being painted. Bring your own cup. Anna has the new key, so ring her if the door "
        "is shut.",
        "summary",
    ),
)


def encode(prompt: Prompt, tokenizer: "PreTrainedTokenizerBase", chat: bool = True) -> list[int]:
    """Token ids of a prompt, inside the chat template if there is one and `chat` wants it."""
    return encode_all([prompt], tokenizer, chat)[0]


def encode_all(
    prompts: Iterable[Prompt],
    tokenizer: "PreTrainedTokenizerBase",
    chat: bool = True,
    day: date | None = None,
) -> list[list[int]]:
    """Encode every prompt with one start of the chat template; errors name the prompt's number."""
    found = []
    with ChatRenderer(tokenizer, day) as renderer:
        for number, prompt in enumerate(prompts, start=1):
            try:
                found.append(encode_with(renderer, prompt, chat))
            except TemplateStopped as error:
                raise error.at(f"prompt {number}") from None
            except UsageError as error:
                raise UsageError(f"prompt {number}: {error}", error.hint) from None
    return found


def encode_with(renderer: ChatRenderer, prompt: Prompt, chat: bool = True) -> list[int]:
    """Token ids of one of many prompts, whose template the caller keeps running."""
    # the template writes the special tokens itself
    plain = not _templated(renderer.tokenizer, chat)
    text = _render(prompt, renderer, chat)
    ids = renderer.tokenizer(text, add_special_tokens=plain)["input_ids"]
    return ids[1:] if plain and begun_twice(text, ids, renderer.tokenizer) else ids


def render(prompt: Prompt, tokenizer: "PreTrainedTokenizerBase", chat: bool = True) -> str:
    """The text that `encode` turns into tokens; raises UsageError where the template refuses."""
    with ChatRenderer(tokenizer) as renderer:
        return _render(prompt, renderer, chat)


def _render(prompt: Prompt, renderer: ChatRenderer, chat: bool) -> str:
    if not _templated(renderer.tokenizer, chat):
        return "\n\n".join(message.get("content") or "" for message in prompt.messages)
    return renderer.render(prompt.messages, prompt.tools, prompt=True, **prompt.template)


def _templated(tokenizer: "PreTrainedTokenizerBase", chat: bool) -> bool:
    return chat and bool(getattr(tokenizer, "chat_template", None))
