"""Recall probes: pairs stated once in a context and asked for at its end, made from a seed.

Two forms, both of random words that are one token each, so that every row has the same length:

kv    lines `key: value` of two words each, then some of the lines again (key-value retrieval)
mqar  short pairs `key value,` that fill three quarters of the row, the last quarter asks for them
      in another order (multi-query associative recall, arXiv 2312.04927, as a prompt)

A value token is right when it is the most likely one after the true tokens before it.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mambactl.errors import UsageError

KV_QUERIES = 16
KV_WIDTH, MQAR_WIDTH = 2, 1  # tokens of a value
MQAR_QUERY_SHARE = 0.25
WORD_LETTERS = range(3, 9)
MOST_WORDS, FEWEST_WORDS = 4096, 8
# two words a key make enough keys of common words, which small models read best
KV_WORDS = 1024
# how byte-level and sentencepiece vocabularies write the space before a word
SPACE_MARKS = ("Ġ", "▁")

SCALARS = ("recall", "token_recall", "recall_loss")


@dataclass(frozen=True)
class RecallProbe:
    """Rows of one form and length: ids [R, T], and which of them are asked-for values [R, T].

    Every value has `width` tokens. `chance` is the recall of guessing among the pairs of the row.
    """

    name: str
    input_ids: Tensor
    answers: Tensor
    width: int
    pairs: int

    @property
    def chance(self) -> float:
        """Expected recall when a value of the row is picked at random."""
        return 1 / self.pairs

    @property
    def queries(self) -> int:
        """Values that are asked for in all rows together."""
        return int(self.answers.sum()) // self.width

    @property
    def picked(self) -> Tensor:
        """Positions [R, T] whose next token is part of an asked-for value."""
        return nn.functional.pad(self.answers[:, 1:], (0, 1))


def recall_probes(
    tokenizer: Any, lengths: Sequence[int], rows: int, seed: int
) -> list[RecallProbe]:
    """Both forms at every length (tokens per row); raises UsageError where they do not fit."""
    return [
        make(tokenizer, length, rows, seed) for length in lengths for make in (kv_probe, mqar_probe)
    ]


def kv_probe(tokenizer: Any, length: int, rows: int, seed: int) -> RecallProbe:
    """Rows of `key: value` lines of at most `length` tokens; see the module."""
    words = word_ids(tokenizer)[:KV_WORDS]
    colon, end = _encode(tokenizer, ":"), _encode(tokenizer, "\n")
    start = _start(tokenizer) + _encode(tokenizer, "These are the entries of a list.\n")
    again = _encode(tokenizer, "Some of the entries again.\n")
    key_width = max(2, _key_width(len(words), length))
    line = key_width + len(colon) + KV_WIDTH + len(end)
    room = (length - len(start) - len(again)) // line
    queries = min(KV_QUERIES, room // 2)
    pairs = room - queries
    _require_room(pairs, queries, "kv", length)
    rng = random.Random(f"kv {length} {seed}")
    made = []
    for _ in range(rows):
        keys, values = _draw(rng, words, pairs, key_width, KV_WIDTH)
        row = _Row(start)
        for key, value in zip(keys, values, strict=True):
            row.add(key, colon, value, end, asked=False)
        row.ids += again
        for index in rng.sample(range(pairs), queries):
            row.add(keys[index], colon, values[index], end, asked=True)
        made.append(row)
    return _probe(f"kv-{length}", made, KV_WIDTH, pairs)


def mqar_probe(tokenizer: Any, length: int, rows: int, seed: int) -> RecallProbe:
    """Rows of short pairs of at most `length` tokens; see the module."""
    words = word_ids(tokenizer)
    comma, start = _encode(tokenizer, ","), _start(tokenizer)
    key_width = _key_width(len(words), length)
    item = key_width + MQAR_WIDTH + len(comma)
    room = (length - len(start)) // item
    queries = round(MQAR_QUERY_SHARE * room)
    pairs = room - queries
    _require_room(pairs, queries, "mqar", length)
    rng = random.Random(f"mqar {length} {seed}")
    made = []
    for _ in range(rows):
        keys, values = _draw(rng, words, pairs, key_width, MQAR_WIDTH)
        row = _Row(start)
        for key, value in zip(keys, values, strict=True):
            row.add(key, [], value, comma, asked=False)
        for index in rng.sample(range(pairs), queries):
            row.add(keys[index], [], values[index], comma, asked=True)
        made.append(row)
    return _probe(f"mqar-{length}", made, MQAR_WIDTH, pairs)


@torch.inference_mode()
def measure_recall(
    model: PreTrainedModel, probe: RecallProbe, batch_size: int = 4
) -> dict[str, float]:
    """`recall` (values that are right in every token), `token_recall`, and `recall_loss`.

    The loss is in nats per value token.
    """
    found = []
    chunks = (t.to(model.device).split(batch_size) for t in (probe.input_ids, probe.picked))
    for ids, picked in zip(*chunks, strict=True):
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        targets = ids.roll(-1, 1)[picked]  # [n]
        found.append(read_answers(hidden[picked], model.get_output_embeddings(), targets))
    return summarise_answers(torch.cat(found), probe.width)


def read_answers(hidden: Tensor, head: nn.Module, targets: Tensor) -> Tensor:
    """Right (0 or 1) and loss of n value tokens [n, 2]; hidden [n, D] after the final norm."""
    logits = head(hidden).float()  # [n, V]
    right = (logits.argmax(-1) == targets).float()
    loss = nn.functional.cross_entropy(logits, targets, reduction="none")
    return torch.stack([right, loss], -1)


def summarise_answers(answers: Tensor, width: int) -> dict[str, float]:
    """The numbers of `SCALARS` from what `read_answers` gave, values in order [n, 2]."""
    right, loss = answers.double().unbind(-1)
    return {
        "recall": float(right.view(-1, width).amin(-1).mean()),
        "token_recall": float(right.mean()),
        "recall_loss": float(loss.mean()),
    }


def word_ids(tokenizer: Any) -> list[int]:
    """Tokens that are one lower-case word, the most common (lowest numbers) first.

    Words with the space before them are preferred: they read as words wherever they stand.
    """
    found: dict[bool, list[int]] = {True: [], False: []}
    for token, index in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]):
        spaced = token.startswith(SPACE_MARKS)
        word = token[1:] if spaced else token
        if word.isascii() and word.isalpha() and word.islower() and len(word) in WORD_LETTERS:
            found[spaced].append(index)
    words = (found[True] if len(found[True]) >= FEWEST_WORDS else found[False])[:MOST_WORDS]
    if len(words) < FEWEST_WORDS:
        raise UsageError(
            "the tokenizer has no vocabulary of plain words to make recall rows from",
            "leave recall out for this model",
        )
    return words


class _Row:
    """One row while it is written: ids, and the positions of asked-for value tokens."""

    def __init__(self, start: list[int]):
        self.ids, self.places = list(start), []

    def add(
        self, key: list[int], between: list[int], value: list[int], end: list[int], asked: bool
    ) -> None:
        self.ids += key + between
        if asked:
            self.places += range(len(self.ids), len(self.ids) + len(value))
        self.ids += value + end


def _probe(name: str, rows: list[_Row], width: int, pairs: int) -> RecallProbe:
    ids = torch.tensor([row.ids for row in rows])  # [R, T]
    answers = torch.zeros_like(ids, dtype=torch.bool)
    for index, row in enumerate(rows):
        answers[index, row.places] = True
    return RecallProbe(name, ids, answers, width, pairs)


def _draw(
    rng: random.Random, words: list[int], pairs: int, key_width: int, value_width: int
) -> tuple[list[list[int]], list[list[int]]]:
    """Keys that all differ, and values of any words."""
    keys = [
        [words[number // len(words) ** place % len(words)] for place in range(key_width)]
        for number in rng.sample(range(len(words) ** key_width), pairs)
    ]
    return keys, [rng.choices(words, k=value_width) for _ in range(pairs)]


def _key_width(words: int, length: int) -> int:
    """Fewest words per key that give enough different keys for a row of `length` tokens."""
    width = 1
    while words**width < length // 2:
        width += 1
    return width


def _start(tokenizer: Any) -> list[int]:
    """What the tokenizer itself puts before a text."""
    ids = tokenizer("", verbose=False)["input_ids"]
    # an end token that it would put behind is not part of a start
    return [index for index in ids if index == tokenizer.bos_token_id][:1]


def _encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _require_room(pairs: int, queries: int, name: str, length: int) -> None:
    if pairs < 2 or queries < 1:
        raise UsageError(
            f"a {name} recall row does not fit in {length} tokens", "ask for longer ones, 256 say"
        )
