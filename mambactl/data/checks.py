"""Documents checked before training, above all chats of which the answers are learned."""

from typing import TYPE_CHECKING, Any

from mambactl.data.bad_rows import DOUBLED, EMPTY, LONG, UNANSWERED, BadRows
from mambactl.data.begin_token import begins_twice
from mambactl.data.encoding import Example
from mambactl.data.sources import Document

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
    answers = [message for message in row["messages"] if message["role"] == "assistant"]
    if empty := sum(not _says(message) for message in answers):
        bad.add(EMPTY, row.where, f"{empty} of {len(answers)} assistant turns are empty")
        return None
    if not answers or not mask.any():
        bad.add(UNANSWERED, row.where, "has no assistant turn, so nothing to learn")
        return None
    if mask[max_length:].any():
        problem = f"has {len(ids)} tokens, and --max-length {max_length} would cut an answer"
        bad.add(LONG, row.where, problem, "raise --max-length")
        return None
    return Example(ids[:max_length], mask[:max_length])


def _says(message: dict[str, Any]) -> bool:
    return bool((message.get("content") or "").strip() or message.get("tool_calls"))
