"""Begin tokens that stand twice: typed in a text, and added by the tokenizer."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def begins_twice(ids: Sequence[int], tokenizer: "PreTrainedTokenizerBase") -> bool:
    """True if token ids [n] start with two begin tokens."""
    begin = tokenizer.bos_token_id
    return begin is not None and len(ids) > 1 and bool(ids[0] == ids[1] == begin)


def begun_twice(text: str, ids: Sequence[int], tokenizer: "PreTrainedTokenizerBase") -> bool:
    """True if the tokenizer has put a begin token before the one with which a text starts."""
    if not begins_twice(ids, tokenizer):
        return False
    return (
        not text.lstrip().removeprefix(tokenizer.bos_token).lstrip().startswith(tokenizer.bos_token)
    )
