"""Model states at several points of a conversation, so that a prompt is read from the last.

A state cannot be shortened. A prompt that extends what was read costs its new tokens alone; one
that parts from it, as a template makes that rewrites earlier messages, is read again from the
newest point that it still begins with.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mambactl.decode.prefill import read_in_pieces
from mambactl.decode.shared_prefix import Prefixes, common
from mambactl.models.cache import HybridCache
from mambactl.models.hybrid import HybridModel

# points that are kept: each holds the recurrent states, and keys and values of its tokens
MOST_POINTS = 6


@dataclass(frozen=True)
class Point:
    """The tokens that were read up to a point, and what the model holds there, one row.

    `answered`: it ends with an answer, whose text is perhaps read as other tokens, and of which
    drafts may still be taken back.
    """

    tokens: list[int]
    cache: HybridCache
    answered: bool = False


class Conversation(Prefixes):
    """The points of one conversation, oldest first, in the place of what several prompts share.

    `parted` is what is known of the last prompt: how many of its tokens it had in common with the
    newest point where it did not extend that one, else None.
    """

    before_graphs = True

    def __init__(self, model: HybridModel):
        super().__init__(model)
        self.points: list[Point] = []
        self.parted: int | None = None

    @torch.no_grad()
    def of(self, prompts: Sequence[Sequence[int]]) -> HybridCache | None:
        """A cache that has read all but the last token of the only prompt, which is kept as well.

        None where the prompt has one token or none.
        """
        (prompt,) = prompts
        ids = list(prompt[:-1])
        start = self._newest(ids)
        self.parted = self._parting(ids)
        held = 0 if start is None else len(start.tokens)
        if held == len(ids):
            self.saved += held
            return start and start.cache
        self._keep(Point(ids, self._read_on(start, ids[held:])))
        self.saved += held
        return self.points[-1].cache

    def ended(
        self, prompts: Sequence[Sequence[int]], tokens: Sequence[Sequence[int]], cache: HybridCache
    ) -> None:
        """Keep what was read while the answer was written: all of it but its last token."""
        if cache.lengths.shape[0] != 1:
            # it ended with its first token, which nobody read
            return
        held = [*prompts[0], *tokens[0][:-1]]
        if cache.recording:
            # drafts behind the end of the answer may have been accepted
            cache.rollback(torch.full_like(cache.lengths, len(held)))
        cache.recording, cache.seen = False, len(held)
        self._keep(Point(held, cache, answered=True))

    def clear(self) -> None:
        """Forget every point."""
        self.points, self.parted = [], None

    def nbytes(self) -> int:
        """Bytes that all points take."""
        return sum(point.cache.nbytes() for point in self.points)

    def _newest(self, ids: list[int]) -> Point | None:
        """The longest point that `ids` begin with."""
        fitting = [point for point in self.points if ids[: len(point.tokens)] == point.tokens]
        return max(fitting, key=lambda point: len(point.tokens), default=None)

    def _parting(self, ids: list[int]) -> int | None:
        if not self.points:
            return None
        newest = self.points[-1].tokens
        shared = common([newest, ids])
        return None if shared in (len(newest), len(ids)) else shared

    def _read_on(self, start: Point | None, ids: list[int]) -> HybridCache:
        if start is None:
            cache = HybridCache(self.model.config, 1, self.model.device)
        else:
            # a copy: keys are written where they lie
            row = torch.zeros(1, dtype=torch.long, device=start.cache.lengths.device)
            cache = start.cache.select(row)
        read_in_pieces(self.model, cache, [ids])
        return cache

    def _keep(self, point: Point) -> None:
        self.points.append(point)
        if len(self.points) > MOST_POINTS:
            # the first holds what every later prompt begins with, a system message perhaps
            del self.points[1]
