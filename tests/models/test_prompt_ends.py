"""Slots that prompts have written last, beside the positions that were written one by one."""

import pytest
import torch

from mambactl.models.prompt_ends import PromptEnds

LENGTHS = [0, 1, 5, 17, 64, 200]


def written(length: int, slots: int, sinks: int = 0) -> list[int]:
    """Position in each slot of a ring behind sinks after so many tokens, -1 in an empty one."""
    held = [-1] * slots
    for position in range(length):
        ring = slots - sinks
        held[position if position < sinks else sinks + position % ring] = position
    return held


@pytest.mark.parametrize("slots", [4, 32])
def test_newest_tokens_lie_at_their_positions_in_the_ring(slots) -> None:
    ends = PromptEnds(torch.tensor([8, 40]))
    assert ends.newest(3, slots).tolist() == [
        [p % slots for p in (5, 6, 7)],
        [p % slots for p in (37, 38, 39)],
    ]
    assert ends.newest(3, slots) is ends.newest(3, slots)


@pytest.mark.parametrize("sinks, ring, room", [(4, 16, 24), (4, 24, 16), (0, 8, 8)])
def test_slots_are_found_in_a_ring_of_another_size(sinks, ring, room) -> None:
    ends = PromptEnds(torch.tensor(LENGTHS))
    found = ends.held(sinks + ring, sinks, ring, room)
    for row, length in enumerate(LENGTHS):
        ours, theirs = written(length, sinks + ring, sinks), written(length, sinks + room, sinks)
        for slot, position in enumerate(ours):
            empty = position < 0 or (position >= sinks and position < length - room)
            assert found.empty[row, 0, slot, 0].item() == empty
            if not empty:
                assert theirs[found.source[row, 0, slot, 0]] == position
    assert ends.held(sinks + ring, sinks, ring, room) is found
