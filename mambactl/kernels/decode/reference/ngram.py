"""Prompt lookup: continue as the text did after the latest earlier match of its last tokens."""

from torch import Tensor


def draft_ngram(
    history: Tensor,
    lengths: Tensor,
    drafts: Tensor,
    width: int,
    n_drafted: Tensor,
    *,
    longest: int = 3,
    pdl: bool = False,
) -> None:
    """Draft up to `width` tokens per sequence from its own text, history int32 [B, S].

    `lengths` int32 [B] counts the tokens present, the pending one included. The longest suffix
    decides, `longest` down to one token, and of its earlier occurrences the latest that a token
    follows. Writes drafts int32 [B, >= width], zero where nothing is copied, and n_drafted [B].
    """
    for row, length in enumerate(lengths.tolist()):
        text = history[row, :length].tolist()
        found = _copy(text, longest, width)
        n_drafted[row] = len(found)
        drafts[row, :width] = 0
        drafts[row, : len(found)] = drafts.new_tensor(found)


def _copy(text: list[int], longest: int, width: int) -> list[int]:
    for size in range(min(longest, len(text)), 0, -1):
        for follower in range(len(text) - 1, size - 1, -1):
            if text[follower - size : follower] == text[len(text) - size :]:
                return text[follower : follower + width]
    return []
