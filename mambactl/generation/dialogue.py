"""A conversation with a model: what was said, and the state behind it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypedDict

from mambactl.checkpoint.load import load_tokenizer
from mambactl.data.chat_template import ChatRenderer
from mambactl.decode.engine import Finish
from mambactl.decode.prompts import Prompt, encode_with
from mambactl.decode.stats import DecodeStats
from mambactl.errors import UsageError
from mambactl.generation import decoding
from mambactl.generation.detokenizer import Detokenizer
from mambactl.options import ChatConfig


class Message(TypedDict):
    """One message of a conversation; `role` is system, user or assistant."""

    role: str
    content: str


@dataclass(frozen=True)
class Answer:
    """Answer of the model to one message.

    `tokens` include the one that ends the text, `finish` is `eos`, `length`, or `stop` where a
    listener ended it, and `stats` counts what was read and written for it. `parted` is the number
    of tokens after which the rendered conversation differed from what had been read, None where
    it went on from there.
    """

    text: str
    tokens: tuple[int, ...]
    finish: Finish
    stats: DecodeStats = field(repr=False)
    parted: int | None = None


class Chat:
    """Messages to and fro; each is read behind the state that the ones before left.

    The text of an answer is that of `generate` for the same messages (on a GPU: but for rounding).
    `close` ends the process that renders the chat template, as leaving a `with` block does.
    """

    def __init__(
        self, source: str, setup: decoding.Setup, renderer: ChatRenderer, system: str | None = None
    ):
        self.source, self.setup, self.renderer = source, setup, renderer
        self.engine = setup.engine()
        self.conversation = self.engine.converse()
        self.messages: list[Message] = []
        self.answers: list[Answer] = []
        self.system = system

    @classmethod
    def open(cls, config: ChatConfig, source: str) -> "Chat":
        """Load the models; what their chat template refuses shows before any weight is read."""
        tokenizer = load_tokenizer(source, trust_remote_code=config.trust_remote_code)
        decoding.require_draft(config, source)
        renderer = ChatRenderer(tokenizer)
        try:
            first = [*_system(config.system), Message(role="user", content="?")]
            encode_with(renderer, Prompt(tuple(first)))
            setup = decoding.assemble(config, *decoding.load_both(config, source, tokenizer), [])
            return cls(source, setup, renderer, config.system)
        except BaseException:
            renderer.close()
            raise

    def __enter__(self) -> "Chat":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process that renders the chat template; the next message starts another."""
        self.renderer.close()

    @property
    def system(self) -> str | None:
        """The text of the system message, None without one."""
        first = self.messages[:1]
        return first[0]["content"] if first and first[0]["role"] == "system" else None

    @system.setter
    def system(self, text: str | None) -> None:
        others = [each for each in self.messages if each["role"] != "system"]
        self.messages = [*_system(text), *others]

    def say(
        self,
        text: str,
        on_text: Callable[[str], object] = lambda piece: None,
        stopped: Callable[[], bool] = lambda: False,
    ) -> Answer:
        """Send a message and return the answer, whose pieces `on_text` hears as they come.

        Once `stopped` is true the answer ends; what there is of it stays in the conversation. A
        message without any answer does not. Raises UsageError for an empty message, and for one
        that the chat template refuses.
        """
        if not text.strip():
            raise UsageError("the message is empty", "write some text")
        messages = [*self.messages, Message(role="user", content=text)]
        ids = encode_with(self.renderer, Prompt(tuple(messages)))
        if not self.answers:
            decoding.warn_beyond_positions(self.setup.target.config, len(ids))
        pieces = Detokenizer(self.setup.tokenizer)

        def listen(row: int, new: list[int]) -> bool:
            on_text(pieces.add(new))
            return stopped()

        result = self.engine.generate([ids], self.setup.params, listen)
        on_text(pieces.finish())
        tokens = result.tokens[0]
        answer = Answer(
            self.setup.text(tokens),
            tuple(tokens),
            result.finish[0],
            result.stats,
            self.conversation.parted,
        )
        self.answers.append(answer)
        if answer.text or answer.finish != "stop":
            self.messages = [*messages, Message(role="assistant", content=answer.text)]
        return answer

    def reset(self) -> None:
        """Forget every message but the system message, and the state behind it."""
        self.messages = self.messages[: len(_system(self.system))]
        self.conversation.clear()

    def total(self) -> DecodeStats:
        """Statistics of all answers together."""
        whole = DecodeStats()
        for answer in self.answers:
            whole.add(answer.stats)
        return whole

    def cache_bytes(self) -> int:
        """Bytes of what the model holds of the conversation, at all points that are kept."""
        return self.conversation.nbytes()

    def describe(self) -> str:
        """Speed of the last answer and of all, what was read again, and the size of the cache."""
        if not self.answers:
            return "nothing was said yet"
        last = self.answers[-1]
        lines = [f"last answer: {decoding.summary(last.stats)}"]
        kept = last.stats.prompt_shared
        if kept:
            lines.append(f"  {kept} of the prompt tokens were read before")
        if last.parted is not None:
            lines.append(
                f"  read again from token {kept}: the rendered chat differs from what was read "
                f"after token {last.parted}"
            )
        again = sum(answer.parted is not None for answer in self.answers)
        lines.append(f"all answers ({len(self.answers)}): {decoding.summary(self.total())}")
        lines.append(f"  answers before which earlier messages were read again: {again}")
        points = len(self.conversation.points)
        lines.append(f"cache: {self.cache_bytes():,} bytes for {points} points of the conversation")
        return "\n".join(lines)


def _system(text: str | None) -> list[Message]:
    return [] if text is None else [Message(role="system", content=text)]
