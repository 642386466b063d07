"""The text of an answer out of its tokens, up to a stop text, and how likely each token was."""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mambactl.decode.open_batch import Likely
from mambactl.generation.detokenizer import Detokenizer
from mambactl.serving.written_text import Arrived

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# as clients call the ends of texts
REASONS = {"eos": "stop", "stop": "stop", "length": "length"}


@dataclass(frozen=True)
class TokenLikely:
    """A token as text, with its log-probability and those of the most likely tokens."""

    token: str
    logprob: float
    top: tuple[tuple[str, float], ...] = ()


@dataclass
class Piece:
    """A part of an answer; the last one has the reason of its end."""

    text: str = ""
    likely: list[TokenLikely] = field(default_factory=list)
    finish: str | None = None


class AnswerText:
    """Turns the tokens of one answer into pieces of text; `tokens` counts those that it has."""

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        stops: Sequence[str],
        alternatives: int | None,
    ):
        self.tokenizer, self.stops, self.alternatives = tokenizer, stops, alternatives
        self._detokenizer = Detokenizer(tokenizer)
        self._held = ""
        # characters in front of each token that is not told yet, and of the answer's text
        self._untold: deque[tuple[int, TokenLikely]] = deque()
        self._length = 0
        self._cut = False
        self.tokens = 0
        self.finish: str | None = None

    def add(self, arrived: Arrived) -> Piece:
        """The piece that has become certain with these tokens, perhaps empty."""
        piece, tokens = Piece(), arrived.tokens
        # a stop text has to be found at the token that completes it
        size = 1 if self.stops else max(len(tokens), 1)
        for start in range(0, len(tokens), size):
            part = tokens[start : start + size]
            self.tokens += len(part)
            self._note(arrived, start, part)
            piece.text += self._released(self._detokenizer.add(part))
            if self.finish is not None:
                break
        if self.finish is None and arrived.finish is not None:
            piece.text += self._released(self._detokenizer.finish())
            piece.text += self._held
            self.finish = self.finish or REASONS[arrived.finish]
        self._length += len(piece.text)
        piece.likely = list(self._told())
        piece.finish = self.finish
        return piece

    def _note(self, arrived: Arrived, start: int, part: Sequence[int]) -> None:
        """Keep how likely tokens were, but for one that ends a text; they begin at `start`."""
        if arrived.likely is None or self.alternatives is None:
            return
        shown = len(arrived.tokens) - (arrived.finish == "eos")
        for token, likely in zip(part, arrived.likely[start:shown], strict=False):
            self._untold.append((self._detokenizer.reached, self._token(token, likely)))

    def _told(self) -> Iterator[TokenLikely]:
        """Tokens of which some text is certain; at the end all, unless a stop text cut them off."""
        last = not self.stops or (self.finish is not None and not self._cut)
        while self._untold and (last or self._untold[0][0] < self._length):
            yield self._untold.popleft()[1]

    def _released(self, text: str) -> str:
        """Return the text so far that is certainly in front of every stop text; hold the rest."""
        if not self.stops:
            return text
        whole = self._held + text
        found = [at for stop in self.stops if (at := whole.find(stop)) >= 0]
        if found:
            self._held, self.finish, self._cut = "", "stop", True
            return whole[: min(found)]
        kept = max(_begun(whole, stop) for stop in self.stops)
        self._held = whole[len(whole) - kept :]
        return whole[: len(whole) - kept]

    def _token(self, token: int, likely: Likely) -> TokenLikely:
        top = likely.top[: self.alternatives]
        return TokenLikely(
            self._name(token), likely.logprob, tuple((self._name(t), value) for t, value in top)
        )

    def _name(self, token: int) -> str:
        name = self.tokenizer.decode([token])
        return name if isinstance(name, str) else "".join(name)


def _begun(text: str, stop: str) -> int:
    """Length of the longest end of a text that is an incomplete beginning of a stop text."""
    most = min(len(stop) - 1, len(text))
    return next((size for size in range(most, 0, -1) if text.endswith(stop[:size])), 0)
