"""The text of an answer out of its tokens, up to a stop text, and how likely each token was."""

from collections.abc import Sequence
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
        self.tokens = 0
        self.finish: str | None = None

    def add(self, arrived: Arrived) -> Piece:
        """The piece that has become certain with these tokens, perhaps empty."""
        piece, before = Piece(), self.tokens
        # a stop text has to be found at the token that completes it
        parts = [[token] for token in arrived.tokens] if self.stops else [arrived.tokens]
        for part in filter(None, parts):
            self.tokens += len(part)
            piece.text += self._released(self._detokenizer.add(part))
            if self.finish is not None:
                break
        if self.finish is None and arrived.finish is not None:
            piece.text += self._released(self._detokenizer.finish())
            piece.text += self._held
            self.finish = self.finish or REASONS[arrived.finish]
        if arrived.likely is not None and self.alternatives is not None:
            # neither the token that ends a text nor what follows a stop text is shown
            shown = self.tokens - before
            if arrived.finish == "eos":
                shown = min(shown, len(arrived.tokens) - 1)
            pairs = zip(arrived.tokens[:shown], arrived.likely, strict=False)
            piece.likely = [self._token(token, likely) for token, likely in pairs]
        piece.finish = self.finish
        return piece

    def _released(self, text: str) -> str:
        """Return the text so far that is certainly in front of every stop text; hold the rest."""
        if not self.stops:
            return text
        whole = self._held + text
        found = [at for stop in self.stops if (at := whole.find(stop)) >= 0]
        if found:
            self._held, self.finish = "", "stop"
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
