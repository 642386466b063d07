"""Text that asks for what it said before: generated pairs with questions, and passages said again.

One writer serves the probes that measure recall (`measure/recall.py`) and the documents that are
mixed into training text, so that a student is matched to its teacher where a memory is needed:

kv     `key = value` lines, then some of the lines again
mqar   short pairs `key value;`, then some of them again (multi-query associative recall,
       arXiv 2312.04927, as a prompt)
copy   a passage of random words, said twice or more

Training documents never share their separators with the probes, nor their words where the
vocabulary is large enough. Every word is one token, so lengths are exact.
"""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

import numpy as np

from mambactl.data.encoding import Example
from mambactl.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WORD_LETTERS = range(3, 9)
MOST_WORDS, FEWEST_WORDS = 4096, 8
# rare words are read worse: SmolLM2-135M-Instruct says 0.78 of a passage of these again, and 0.49
# of one of the lower-case words that come after the probes'
MOST_NAMES = 2048
# with fewer words that no probe uses, documents are made of the probes' words
FEWEST_NAMES = 256
# how byte-level and sentencepiece vocabularies write the space before a word
SPACE_MARKS = ("Ġ", "▁")

Kind = Literal["kv", "mqar", "copy"]
SHORTEST = 64
# of a document's lines; more questions than pairs go round again, for only answers teach recall
FEWEST_ASKED, MOST_ASKED = 0.3, 0.7
FEWEST_LINES = 4
KEY_WIDTHS, VALUE_WIDTHS = (1, 2), (1, 3)  # tokens, both ends included


@dataclass(frozen=True)
class Form:
    """Layout of a document of pairs, in tokens.

    `start`, a line `key between value end` per pair, `again`, then lines of asked-for pairs.
    """

    start: list[int]
    between: list[int]
    end: list[int]
    again: list[int]
    key_width: int
    value_width: int

    @property
    def line(self) -> int:
        """Number of tokens of a pair."""
        return self.key_width + len(self.between) + self.value_width + len(self.end)


class Written(NamedTuple):
    """Token ids, and the positions of those that can be read off what stands before them."""

    ids: list[int]
    positions: list[int]


class RecallDocument(NamedTuple):
    """One document for training: ids int32 [n], and which of them are answers, bool [n].

    `choices` is how many pairs (or words of a passage) an answer is one of.
    """

    input_ids: np.ndarray
    answers: np.ndarray
    kind: Kind
    choices: int

    @property
    def example(self) -> Example:
        """The document as any other: every token is worth learning, for the teacher knows it."""
        return Example(self.input_ids, np.ones(len(self.input_ids), bool))


class Phrasing(NamedTuple):
    """A form in words."""

    start: str
    between: str
    end: str
    again: str = ""


# The probes separate by colon and comma, and nothing here does. Signs and not verbs: after ` is`
# a small teacher says what is true of a word, and not what stood above.
PHRASINGS: dict[Kind, tuple[Phrasing, ...]] = {
    "kv": (
        Phrasing("Settings\n", " =", "\n", "Settings in use\n"),
        Phrasing("Routes\n", " ->", "\n", "Routes taken\n"),
        Phrasing("A table\n", " |", "\n", "Rows of the table\n"),
        Phrasing("What is known\n", " -", "\n", "What was asked\n"),
    ),
    "mqar": (
        Phrasing("", "", ";"),
        Phrasing("", "", "."),
        Phrasing("", "", " |"),
        Phrasing("", "", " /"),
    ),
    "copy": (
        Phrasing("", "", "\n"),
        Phrasing("", "", ".\n", "Once more.\n"),
        Phrasing("Repeat after me.\n", "", ";\n"),
    ),
}


def recall_documents(
    tokenizer: "PreTrainedTokenizerBase", tokens: int, max_length: int, seed: int
) -> list[RecallDocument]:
    """Documents of together `tokens` (to half of `SHORTEST`), each of 64 to `max_length` tokens.

    Lengths are uniform in their logarithm, so every scale of distance gets as many tokens. Raises
    UsageError where rows are too short or the vocabulary has no words.
    """
    if not tokens:
        return []
    require_recall_length(max_length)
    return list(_documents(tokenizer, tokens, max_length, seed))


def require_recall_length(max_length: int) -> None:
    """Raise UsageError for rows that no recall document fits in."""
    if max_length < SHORTEST:
        raise UsageError(
            f"recall documents have {SHORTEST} tokens and more, rows have {max_length}",
            "give a larger --max-length, or drop --recall-share",
        )


def recall_tokens(share: float, text_tokens: int) -> int:
    """Number of tokens that are `share` of all when added to `text_tokens`."""
    return round(text_tokens * share / (1 - share))


def _documents(
    tokenizer: "PreTrainedTokenizerBase", tokens: int, max_length: int, seed: int
) -> Iterator[RecallDocument]:
    words, start = training_words(tokenizer), start_ids(tokenizer)
    rng = random.Random(f"recall documents {seed}")
    left = tokens
    while left >= SHORTEST // 2:
        length = round(math.exp(rng.uniform(math.log(SHORTEST), math.log(max_length))))
        length = max(SHORTEST, min(length, left))
        yield _document(tokenizer, start, words, length, rng)
        left -= length


def _document(
    tokenizer: "PreTrainedTokenizerBase",
    start: list[int],
    words: Sequence[int],
    length: int,
    rng: random.Random,
) -> RecallDocument:
    """One document of exactly `length` tokens, the last line cut where it must be."""
    kind = rng.choice(get_args(Kind))
    form = _form(tokenizer, start, rng.choice(PHRASINGS[kind]), kind, len(words), length, rng)
    lines = math.ceil((length - len(form.start) - len(form.again)) / form.line)
    if kind == "copy" or lines < FEWEST_LINES:
        kind, choices = "copy", rng.randint(length // 6, length // 2)
        written = _copy(form, rng.choices(words, k=choices), length)
    else:
        queries = int(rng.uniform(FEWEST_ASKED, MOST_ASKED) * lines)
        choices = lines - queries
        written = write_pairs(form, words, choices, queries, rng)
    ids = np.asarray(written.ids[:length], np.int32)
    answers = np.zeros(length, bool)
    answers[[position for position in written.positions if position < length]] = True
    return RecallDocument(ids, answers, kind, choices)


def _form(
    tokenizer: "PreTrainedTokenizerBase",
    start: list[int],
    phrasing: Phrasing,
    kind: Kind,
    words: int,
    length: int,
    rng: random.Random,
) -> Form:
    return Form(
        start + encode_words(tokenizer, phrasing.start),
        encode_words(tokenizer, phrasing.between),
        encode_words(tokenizer, phrasing.end),
        encode_words(tokenizer, phrasing.again),
        max(rng.randint(*KEY_WIDTHS), key_width(words, length)),
        1 if kind == "mqar" else rng.randint(*VALUE_WIDTHS),
    )


def _copy(form: Form, passage: list[int], length: int) -> Written:
    """Repeat `passage` until there are `length` tokens or more."""
    ids, positions = form.start + passage + form.end + form.again, []
    while len(ids) < length:
        positions += range(len(ids), len(ids) + len(passage))
        ids += passage + form.end
    return Written(ids, positions)


def write_pairs(
    form: Form, words: Sequence[int], pairs: int, queries: int, rng: random.Random
) -> Written:
    """State `pairs` of different keys and any values, then ask `queries` times for one of them.

    None is asked for again before all others were.
    """
    keys = [
        [words[number // len(words) ** digit % len(words)] for digit in range(form.key_width)]
        for number in rng.sample(range(len(words) ** form.key_width), pairs)
    ]
    values = [rng.choices(words, k=form.value_width) for _ in range(pairs)]
    ids, positions = list(form.start), []
    for key, value in zip(keys, values, strict=True):
        ids += key + form.between + value + form.end
    ids += form.again
    asked: list[int] = []
    while len(asked) < queries:
        asked += rng.sample(range(pairs), min(pairs, queries - len(asked)))
    for index in asked:
        ids += keys[index] + form.between
        positions += range(len(ids), len(ids) + form.value_width)
        ids += values[index] + form.end
    return Written(ids, positions)


def word_ids(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Tokens of the probes: one lower-case word each, the most common (lowest numbers) first."""
    words = _words(tokenizer, str.islower)[:MOST_WORDS]
    if len(words) < FEWEST_WORDS:
        raise UsageError(
            "the tokenizer has no vocabulary of plain words to make recall rows from",
            "leave recall out for this model",
        )
    return words


def training_words(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Tokens that no probe has, names and other words with a capital, the most common first.

    A vocabulary with few of them gives the words of the probes.
    """
    names = _words(tokenizer, str.istitle)[:MOST_NAMES]
    return names if len(names) >= FEWEST_NAMES else word_ids(tokenizer)


def _words(tokenizer: "PreTrainedTokenizerBase", wanted: Callable[[str], bool]) -> list[int]:
    """Ids of wanted words, preferably with the space before them: they read as words anywhere."""
    found: dict[bool, list[int]] = {True: [], False: []}
    for token, index in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]):
        spaced = token.startswith(SPACE_MARKS)
        word = token[1:] if spaced else token
        if word.isascii() and word.isalpha() and wanted(word) and len(word) in WORD_LETTERS:
            found[spaced].append(index)
    return found[True] if len(found[True]) >= FEWEST_WORDS else found[False]


def key_width(words: int, length: int) -> int:
    """Fewest words per key that give enough different keys for a row of `length` tokens."""
    width = 1
    while words**width < length // 2:
        width += 1
    return width


def start_ids(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Ids that the tokenizer itself puts before a text."""
    ids = tokenizer("", verbose=False)["input_ids"]
    # an end token that it would put behind is not part of a start
    return [index for index in ids if index == tokenizer.bos_token_id][:1]


def encode_words(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    """Tokens of a phrase inside a text."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
