"""Needles of several kinds as a recall probe: sentences in a text, and answers about them.

The sentences are others than that of `eval --needle`, which can judge what is chosen by them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from mambactl.data.haystack import Haystack, make_frame, needle_prompt
from mambactl.data.recall_documents import encode_words
from mambactl.evaluation.recall import RecallProbe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# tokens of text in a row that count, at most about so many
TEXT_TOKENS = 256


@dataclass(frozen=True)
class Fact:
    """A sentence, the question about it, and how the answer begins and ends."""

    sentence: str
    question: str
    begins: str
    ends: str


FACTS = (
    Fact(
        "The secret ingredient of Martha's soup is a spoon of dried lemon peel.",
        "What is the secret ingredient of Martha's soup?",
        "The secret ingredient of Martha's soup is a spoon of",
        " dried lemon peel",
    ),
    Fact(
        "The password of the old lighthouse is seven green bottles.",
        "What is the password of the old lighthouse?",
        "The password of the old lighthouse is",
        " seven green bottles",
    ),
    Fact(
        "Doctor Okafor keeps the spare key under the blue flower pot behind the garage.",
        "Where does Doctor Okafor keep the spare key?",
        "Doctor Okafor keeps the spare key under the",
        " blue flower pot behind the garage",
    ),
    Fact(
        "The night train to Lisbon leaves from platform nine at a quarter past four.",
        "When does the night train to Lisbon leave?",
        "The night train to Lisbon leaves from",
        " platform nine at a quarter past four",
    ),
)


def fact_probe(
    tokenizer: "PreTrainedTokenizerBase",
    rows: Sequence[dict[str, object]],
    length: int,
    count: int,
    seed: int,
) -> RecallProbe:
    """`count` rows of `length` tokens around the text of `rows`; every token of an answer counts.

    Raises UsageError where no text fits in.
    """
    haystack = Haystack(rows, tokenizer, seed)
    templated = bool(getattr(tokenizer, "chat_template", None))
    ids, answers, text = [], [], []
    for row in range(count):
        fact = FACTS[(seed + row) % len(FACTS)]
        frame = make_frame(tokenizer, sentence=fact.sentence, question=fact.question)
        # together, for tokens may reach over a space
        begins = encode_words(tokenizer, fact.begins if templated else f" {fact.begins}")
        ends = encode_words(tokenizer, fact.ends)
        room = len(begins) + len(ends)
        # far from the question, where no window sees it
        depth = 0.5 * (row + 1) / (count + 1)
        prompt = needle_prompt(haystack, frame, length, depth, room)
        ids.append([*prompt, *begins, *ends])
        position = torch.arange(length)
        answers.append(position >= length - len(ends))
        inside = (position >= len(frame.before)) & (position < len(prompt) - len(frame.after))
        text.append(inside & (position % max(1, length // TEXT_TOKENS) == 0))
    return RecallProbe(
        f"needle-{length}", torch.tensor(ids), torch.stack(answers), 1, 1, torch.stack(text)
    )
