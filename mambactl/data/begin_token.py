"""Begin tokens that stand twice: typed in a text, and added by the tokenizer."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from mambactl.data.encoding import TokenIds


def begins_twice(ids: "TokenIds", tokenizer: "PreTrainedTokenizerBase") -> bool:
    """True if token ids [n] start with two begin tokens."""
    begin = tokenizer.bos_token_id
    return begin is not None and len(ids) > 1 and bool(ids[0] == ids[1] == begin)


def begun_twice(text: str, ids: "TokenIds", tokenizer: "PreTrainedTokenizerBase") -> bool:
    """True if the tokenizer has put a begin token before the one with which a text starts."""
    if not begins_twice(ids, tokenizer):
        return False
    begin = str(tokenizer.bos_token)
    return not text.lstrip().removeprefix(begin).lstrip().startswith(begin)
