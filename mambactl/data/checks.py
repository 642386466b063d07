"""Documents checked before training, above all chats of which the answers are learned."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from mambactl import console
from mambactl.data.bad_rows import DOUBLED, EMPTY, LONG, UNANSWERED, BadRows
from mambactl.data.begin_token import begins_twice
from mambactl.data.encoding import Example
from mambactl.data.sources import Document
from mambactl.data.turns import ASSISTANT, Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def screened(
    row: Document,
    example: Example,
    tokenizer: "PreTrainedTokenizerBase",
    bad: BadRows,
    max_length: int | None = None,
) -> Example | None:
    """The example as it can be learned from, or None for a row that goes to `bad`.

    With `max_length` answers are what is learned of a chat: none may be missing, empty or cut. What
    follows the last one teaches nothing, so that may be cut.
    """
    ids, mask = example
    if begins_twice(ids, tokenizer):
        token = tokenizer.bos_token
        cure = "correct the chat template" if "messages" in row else "leave it to the tokenizer"
        bad.add(DOUBLED, row.where, f"begins with {token} twice", cure)
        return None
    if max_length is None or "messages" not in row:
        return example
    learned = row.get("learned", range(len(row["messages"])))
    answers = [row["messages"][n] for n in learned if row["messages"][n]["role"] == ASSISTANT]
    if empty := sum(not _says(message) for message in answers):
        bad.add(EMPTY, row.where, f"{empty} of {len(answers)} assistant turns are empty")
        return None
    if not answers or not mask.any():
        which = "that is to be learned" if "learned" in row else "of the assistant"
        bad.add(UNANSWERED, row.where, f"has no turn {which}, so nothing to learn")
        return None
    if mask[max_length:].any():
        problem = f"has {len(ids)} tokens, and --max-length {max_length} would cut an answer"
        bad.add(LONG, row.where, problem, "raise --max-length")
        return None
    return Example(ids[:max_length], mask[:max_length])


class Endings:
    """Answers that end with an end token: a model that learns none of them does not stop."""

    def __init__(self, ends: Iterable[int]):
        self.ends = frozenset(ends)
        self.rows, self.endless = 0, 0
        self.first = ""

    def see(self, row: Document, example: Example) -> None:
        """Look at the last token of every span that is learned of a row with answers."""
        if "text" in row:
            return
        mask = example.loss_mask
        last = example.input_ids[mask & ~np.append(mask[1:], False)]
        self.rows += 1
        if not self.ends.intersection(last.tolist()):
            self.endless += 1
            self.first = self.first or row.where

    def tell(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        """Warn of rows without a learned end token."""
        if not self.endless:
            return
        which = (
            "no row learns" if self.endless == self.rows else f"{self.endless} rows do not learn"
        )
        names = ", ".join(map(str, tokenizer.convert_ids_to_tokens(sorted(self.ends)))) or "none"
        console.warn(
            f"{which} an end token of the model ({names}), the first is {self.first}: it is not "
            "taught to stop; correct the chat template, or the end tokens in generation_config.json"
        )


def _says(message: Row) -> bool:
    return bool((message.get("content") or "").strip() or message.get("tool_calls"))
