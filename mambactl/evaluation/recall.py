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
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mambactl.data.recall_documents import (
    Form,
    encode_words,
    key_width,
    start_ids,
    word_ids,
    write_pairs,
)
from mambactl.errors import UsageError
from mambactl.evaluation.output_head import output_head

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KV_QUERIES = 16
KV_WIDTH, MQAR_WIDTH = 2, 1  # tokens of a value
MQAR_QUERY_SHARE = 0.25
# two words a key make enough keys of common words, which small models read best
KV_WORDS = 1024

# logits that may exist at a time, in elements, and tokens of a forward pass
CHUNK_ELEMENTS = 2**24
MOST_TOKENS = 2**14


@dataclass(frozen=True)
class RecallProbe:
    """Rows of one form and length: ids [R, T], and which of them are asked-for values [R, T].

    Every value has `width` tokens. `chance` is the recall of guessing among the pairs of the row.
    Rows may hold plain `text` [R, T] beside what is asked for.
    """

    name: str
    input_ids: Tensor
    answers: Tensor
    width: int
    pairs: int
    text: Tensor | None = None

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

    @property
    def length(self) -> int:
        """Tokens of a row."""
        return self.input_ids.shape[1]

    def batches(self, size: int) -> list[tuple[Tensor, Tensor]]:
        """Ids and `picked` of rows that are read together, `size` at most and fewer long ones."""
        size = max(1, min(size, MOST_TOKENS // self.length))
        return list(zip(self.input_ids.split(size), self.picked.split(size), strict=True))

    @property
    def spoken(self) -> Tensor:
        """Positions [R, T] whose next token is plain text."""
        if self.text is None:
            return torch.zeros_like(self.answers)
        return nn.functional.pad(self.text[:, 1:], (0, 1))


def recall_probes(
    tokenizer: "PreTrainedTokenizerBase", lengths: Sequence[int], rows: int, seed: int
) -> list[RecallProbe]:
    """Probes of both forms at every length (tokens per row); UsageError where they do not fit."""
    return [
        make(tokenizer, length, rows, seed) for length in lengths for make in (kv_probe, mqar_probe)
    ]


def kv_probe(
    tokenizer: "PreTrainedTokenizerBase", length: int, rows: int, seed: int
) -> RecallProbe:
    """Rows of `key: value` lines of at most `length` tokens; see the module."""
    words = word_ids(tokenizer)[:KV_WORDS]
    colon, end = encode_words(tokenizer, ":"), encode_words(tokenizer, "\n")
    start = encode_words(tokenizer, "These are the entries of a list.\n")
    again = encode_words(tokenizer, "Some of the entries again.\n")
    width = max(2, key_width(len(words), length))
    start = start_ids(tokenizer) + start
    form = Form(start, colon, end, again, width, KV_WIDTH)
    room = (length - len(start) - len(again)) // form.line
    queries = min(KV_QUERIES, room // 2)
    return _probe("kv", form, words, room - queries, queries, length, rows, seed)


def mqar_probe(
    tokenizer: "PreTrainedTokenizerBase", length: int, rows: int, seed: int
) -> RecallProbe:
    """Rows of short pairs of at most `length` tokens; see the module."""
    words = word_ids(tokenizer)
    comma, start = encode_words(tokenizer, ","), start_ids(tokenizer)
    form = Form(start, [], comma, [], key_width(len(words), length), MQAR_WIDTH)
    room = (length - len(start)) // form.line
    queries = round(MQAR_QUERY_SHARE * room)
    return _probe("mqar", form, words, room - queries, queries, length, rows, seed)


def measure_recall(
    model: PreTrainedModel,
    probe: RecallProbe,
    batch_size: int = 4,
    amp: torch.dtype | None = None,
) -> dict[str, float]:
    """`recall` (values that are right in every token), `token_recall`, and `recall_loss`.

    The loss is in nats per value token. With `amp` the blocks run in mixed precision.
    """
    return summarise_answers(measure_answers(model, probe, batch_size, amp), probe.width)


def measure_answers(
    model: PreTrainedModel,
    probe: RecallProbe,
    batch_size: int = 4,
    amp: torch.dtype | None = None,
) -> Tensor:
    """Right (0 or 1) and loss of every value token of a probe, in order [n, 2]."""
    return torch.cat([read_rows(model, rows, amp) for rows in probe.batches(batch_size)])


@torch.no_grad()
def read_rows(
    model: PreTrainedModel, rows: tuple[Tensor, Tensor], amp: torch.dtype | None = None
) -> Tensor:
    """`measure_answers` of a batch of rows: their ids [B, T], and what is picked [B, T]."""
    ids, picked = (each.to(model.device) for each in rows)
    with torch.autocast(ids.device.type, dtype=amp, enabled=amp is not None):
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    targets, head = ids.roll(-1, 1)[picked], output_head(model)  # [n]
    return read_answers(hidden[picked].to(head.weight.dtype), head, targets)


def recalled_by_row(answers: Tensor, probe: RecallProbe) -> np.ndarray:
    """Values of each row that are right in every token [R], from what `measure_answers` gave."""
    right = answers[:, 0].double().cpu().view(-1, probe.width).amin(-1)
    rows = torch.arange(len(probe.answers)).repeat_interleave(probe.picked.sum(1) // probe.width)
    return torch.zeros(len(probe.answers), dtype=torch.double).index_add(0, rows, right).numpy()


def read_answers(hidden: Tensor, head: nn.Linear, targets: Tensor) -> Tensor:
    """Right (0 or 1) and loss of n value tokens [n, 2]; hidden [n, D] after the final norm.

    Long rows ask for thousands of values, so logits exist for a part of them at a time.
    """
    size = max(1, CHUNK_ELEMENTS // head.weight.shape[0])
    pieces = zip(hidden.split(size), targets.split(size), strict=True)
    return torch.cat([_read(piece, head, wanted) for piece, wanted in pieces])


def _read(hidden: Tensor, head: nn.Linear, targets: Tensor) -> Tensor:
    logits = head(hidden).float()  # [n, V]
    right = (logits.argmax(-1) == targets).float()
    loss = nn.functional.cross_entropy(logits, targets, reduction="none")
    return torch.stack([right, loss], -1)


def summarise_answers(answers: Tensor, width: int) -> dict[str, float]:
    """Recall, recall of tokens and loss from what `read_answers` gave, values in order [n, 2]."""
    right, loss = answers.double().unbind(-1)
    return {
        "recall": float(right.view(-1, width).amin(-1).mean()),
        "token_recall": float(right.mean()),
        "recall_loss": float(loss.mean()),
    }


def _probe(
    name: str,
    form: Form,
    words: list[int],
    pairs: int,
    queries: int,
    length: int,
    rows: int,
    seed: int,
) -> RecallProbe:
    if pairs < 2 or queries < 1:
        raise UsageError(
            f"a {name} recall row does not fit in {length} tokens", "ask for longer ones, 256 say"
        )
    rng = random.Random(f"{name} {length} {seed}")
    made = [write_pairs(form, words, pairs, queries, rng) for _ in range(rows)]
    ids = torch.tensor([row.ids for row in made])  # [R, T]
    answers = torch.zeros_like(ids, dtype=torch.bool)
    for index, row in enumerate(made):
        answers[index, row.positions] = True
    return RecallProbe(f"{name}-{length}", ids, answers, form.value_width, pairs)
