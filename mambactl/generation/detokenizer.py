"""Text out of tokens as they arrive; the pieces add up to the text of all tokens."""

import re
from collections.abc import Sequence
from typing import Protocol

# what stands for bytes that are no character, or not yet
INCOMPLETE = "\ufffd"
# a token of one byte in a vocabulary of pieces
BYTE = re.compile(r"<0x[0-9A-F]{2}>")
# tokens whose text is made anew at every step, at most, and those that are left of them then
MOST_TOKENS, KEPT_TOKENS = 32, 12


class Decoder(Protocol):
    """The part of a tokenizer that turns tokens into text."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str | list[str]:
        """The text of tokens."""
        ...

    def convert_ids_to_tokens(self, ids: list[int]) -> str | list[str]:
        """The names of tokens."""
        ...


def text_of(tokenizer: Decoder, tokens: Sequence[int]) -> str:
    """The text of tokens, without special ones."""
    text = tokenizer.decode(list(tokens), skip_special_tokens=True)
    return text if isinstance(text, str) else "".join(text)


class Detokenizer:
    """Turns one sequence of tokens into pieces of text, none of which is ever taken back.

    What later tokens may change is held back: a character of which bytes are missing, a run of
    tokens that are a byte each, since one that fits nowhere spoils the whole run, and the last
    word where the tokenizer tidies spaces, because punctuation that follows moves up to it.
    `reached` is the length of the text of all tokens so far, but for bytes that are no character.
    """

    def __init__(self, tokenizer: Decoder):
        self._tokenizer = tokenizer
        self._tidies = bool(getattr(tokenizer, "clean_up_tokenization_spaces", False))
        # leave no text, so that bytes on both sides of one are a run
        self._special = frozenset(getattr(tokenizer, "all_special_ids", ()))
        self._tokens: list[int] = []
        # at their end, those that are a byte each
        self._bytes = 0
        # tokens at which the first ones are to be forgotten
        self._full = MOST_TOKENS
        # of the text of those tokens: what was handed out
        self._given = ""
        # characters of all that was handed out, and of all tokens
        self._handed = self.reached = 0

    def add(self, tokens: Sequence[int]) -> str:
        """The text that has become certain with these tokens, perhaps none."""
        self._tokens.extend(tokens)
        self._bytes = self._bytes_at_end(tokens)
        text = self._text(self._tokens[: len(self._tokens) - self._bytes])
        self.reached = self._handed + len(text.rstrip(INCOMPLETE)) - len(self._given)
        certain = text[: max(text.rfind(" "), 0)] if self._tidies else text
        if certain.endswith(INCOMPLETE) or not certain.startswith(self._given):
            return ""
        piece = certain[len(self._given) :]
        self._given = certain
        self._handed += len(piece)
        if len(self._tokens) >= self._full and not self._bytes:
            self._forget(text)
        return piece

    def finish(self) -> str:
        """The text that was held back."""
        text = self._text(self._tokens)
        piece = text[len(self._given) :]
        self._given = text
        return piece

    def _bytes_at_end(self, new: Sequence[int]) -> int:
        for index, token in enumerate(reversed(new)):
            name = self._tokenizer.convert_ids_to_tokens([token])[0]
            if token not in self._special and not BYTE.fullmatch(name or ""):
                return index
        return self._bytes + len(new)

    def _forget(self, text: str) -> None:
        """Drop the first tokens of a text, if without them it goes on in the same way.

        A tokenizer treats the start of a text in its own way: what is compared lies behind it.
        """
        start, middle = (len(self._tokens) - kept for kept in (KEPT_TOKENS, KEPT_TOKENS // 2))
        head, before = self._text(self._tokens[:middle]), self._text(self._tokens[start:middle])
        shorter = self._text(self._tokens[start:])
        same = text[len(head) :] == shorter[len(before) :]
        if same and self._given.startswith(head) and shorter.startswith(before):
            self._tokens = self._tokens[start:]
            self._given = before + self._given[len(head) :]
        # where it was in vain, some more tokens come before the next time
        self._full = len(self._tokens) + MOST_TOKENS - KEPT_TOKENS

    def _text(self, tokens: Sequence[int]) -> str:
        return text_of(self._tokenizer, tokens)
