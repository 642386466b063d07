"""Model states after earlier prompts, so that later ones are read from there on.

A conversation's next prompt extends the last one, and prompts with the same instructions part after
them. A state cannot be shortened, so what is kept is kept at points: the end of every prompt, and
where a prompt parts from an earlier one. What was used longest ago goes first.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from mambactl import console
from mambactl.decode.prompt_reading import ReadPrompt, ReadRows
from mambactl.decode.shared_prefix import LEAST_SHARED, common


@dataclass
class KeptPoint:
    """A prompt that is kept, as a row of those that were read with it until it is used."""

    tokens: list[int]
    source: ReadPrompt | ReadRows
    # bytes of the source
    size: int
    row: int = 0

    def prompt(self) -> ReadPrompt:
        """The prompt on its own, from now on the same one."""
        if isinstance(self.source, ReadRows):
            self.source, self.row = self.source.prompt(self.row), 0
            self.size = self.source.nbytes()
        return self.source


class KeptPrompts:
    """Points of at most `most` bytes together."""

    def __init__(self, most: int):
        self.most, self.nbytes = most, 0
        # the one used last at the end
        self.points: list[KeptPoint] = []

    def longest(self, prompt: Sequence[int]) -> ReadPrompt | None:
        """The point with the most tokens that the prompt begins with, all of them perhaps."""
        found = None
        for point in self.points:
            size = len(point.tokens)
            if found is not None and size <= len(found.tokens):
                continue
            if size <= len(prompt) and point.tokens[-1] == prompt[size - 1]:
                found = point if point.tokens == list(prompt[:size]) else found
        return None if found is None else self._use(found)

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

    def keep(self, read: ReadRows) -> None:
        """Hold prompts that were read, in the place of what was used longest ago.

        Rows that were read together stay together: to part them is thousands of small copies.
        """
        read = read.own()
        size = read.nbytes()
        together = len(read.prompts) > 1 and size <= self.most
        for row, prompt in enumerate(read.prompts):
            if any(each.tokens == prompt for each in self.points):
                continue
            if together:
                self.points.append(KeptPoint(prompt, read, size, row))
            else:
                self._keep_alone(read.prompt(row))
        self._bound()

    def _keep_alone(self, prompt: ReadPrompt) -> None:
        if (size := prompt.nbytes()) <= self.most:
            self.points.append(KeptPoint(prompt.tokens, prompt, size))
            self._bound()

    def _use(self, point: KeptPoint) -> ReadPrompt | None:
        """The prompt of a point, which is the one used last; None without memory for it."""
        self.points = [each for each in self.points if each is not point]
        try:
            prompt = point.prompt()
        except (RuntimeError, MemoryError) as error:
            console.warn(f"a kept prompt is read again: {error}")
            self._bound()
            return None
        self.points.append(point)
        self._bound()
        return prompt

    def _bound(self) -> None:
        """Let go of the points used longest ago, until the others fit, and count their bytes."""
        while self._held() > self.most:
            self.points.pop(0)
        self.nbytes = self._held()

    def _held(self) -> int:
        return sum({id(point.source): point.size for point in self.points}.values())
