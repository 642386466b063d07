"""Model states after earlier prompts, so that later ones are read from there on.

A conversation's next prompt extends the last one, and prompts with the same instructions part after
them. A state cannot be shortened, so what is kept is kept at points: the end of every prompt, and
where a prompt parts from an earlier one. What was used longest ago goes first.
"""

from collections.abc import Sequence

from mambactl.decode.prompt_reading import ReadPrompt
from mambactl.decode.shared_prefix import LEAST_SHARED, common


class KeptPrompts:
    """Points of at most `most` bytes together."""

    def __init__(self, most: int):
        self.most, self.nbytes = most, 0
        # the one used last at the end
        self.points: list[ReadPrompt] = []

    def longest(self, prompt: Sequence[int]) -> ReadPrompt | None:
        """The point with the most tokens that the prompt begins with, all of them perhaps."""
        found = None
        for point in self.points:
            size = len(point.tokens)
            if found is not None and size <= len(found.tokens):
                continue
            if size <= len(prompt) and point.tokens[-1] == prompt[size - 1]:
                found = point if point.tokens == list(prompt[:size]) else found
        if found is not None:
            self._remove(found)
            self.points.append(found)
        return found

    def branch(self, prompt: Sequence[int], known: int) -> int | None:
        """Index at which another prompt parts, at least `LEAST_SHARED` behind the `known` tokens.

        None if there is none, or if it is too close to the prompt's end to pay.
        """
        least = known + LEAST_SHARED
        start = list(prompt[:least])
        # most part earlier, which one comparison shows
        alike = [point.tokens for point in self.points if point.tokens[:least] == start]
        shared = max((common([tokens, prompt]) for tokens in alike), default=0)
        return shared if least <= shared <= len(prompt) - LEAST_SHARED else None

    def keep(self, point: ReadPrompt) -> None:
        """Hold a point too, in the place of what was used longest ago."""
        size = point.nbytes()
        if size > self.most or any(each.tokens == point.tokens for each in self.points):
            return
        self.points.append(point)
        self.nbytes += size
        while self.nbytes > self.most:
            self.nbytes -= self.points.pop(0).nbytes()

    def _remove(self, point: ReadPrompt) -> None:
        self.points = [each for each in self.points if each is not point]
