"""Groups of token rows that are cheaper to read together behind a shared prefix.

The choices of a question share the question, the questions of a subject share its worked examples:
read once, such a beginning is a cache from which every row goes on.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# a token behind a cache costs more than one of a plain row: masks, states that are copied
AFTER_CACHE = 1.25
# rows behind one beginning, which bounds the search
MOST_ROWS = 256
# a shorter beginning is not worth a cache
LEAST_SHARED = 4


@dataclass(frozen=True)
class Group:
    """Rows that begin with the same `shared` tokens; a row alone shares all of its own."""

    rows: list[int]
    shared: int


def group_by_prefix(rows: Sequence[np.ndarray]) -> list[Group]:
    """Split distinct rows of token ids into the groups that are cheapest to read.

    In the order of their tokens, rows that share a beginning are neighbours; dynamic programming
    over that order finds the best cuts.
    """
    if not rows:
        return []
    order = sorted(range(len(rows)), key=lambda row: rows[row].astype(">u4").tobytes())
    common = [_common(rows[a], rows[b]) for a, b in zip(order, order[1:], strict=False)]
    lengths = [len(rows[row]) for row in order]
    cuts = _cuts(lengths, common)
    groups = []
    for start, end in zip(cuts, cuts[1:], strict=False):
        shared = min(common[start : end - 1]) if end - start > 1 else lengths[start]
        groups.append(Group(order[start:end], shared))
    return groups


def _common(one: np.ndarray, other: np.ndarray) -> int:
    length = min(len(one), len(other))
    differs = one[:length] != other[:length]
    return int(differs.argmax()) if differs.any() else length


def _cuts(lengths: Sequence[int], common: Sequence[int]) -> list[int]:
    """Group boundaries [0, ..., len(lengths)]; rows i and i + 1 share `common[i]` tokens."""
    best, previous = [0.0], [0]
    for end in range(1, len(lengths) + 1):
        least, where = best[end - 1] + lengths[end - 1], end - 1
        total, shared = lengths[end - 1], lengths[end - 1]
        for start in range(end - 2, max(end - 1 - MOST_ROWS, -1), -1):
            shared = min(shared, common[start])
            if shared < LEAST_SHARED:
                break
            total += lengths[start]
            cost = best[start] + shared + AFTER_CACHE * (total - (end - start) * shared)
            if cost < least:
                least, where = cost, start
        best.append(least)
        previous.append(where)
    cuts = [len(lengths)]
    while cuts[-1] > 0:
        cuts.append(previous[cuts[-1]])
    return cuts[::-1]
