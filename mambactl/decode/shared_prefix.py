"""What prompts have in common, read once: instructions, worked examples, a document."""

from collections.abc import Sequence

from mambactl.decode.prefill import read_in_pieces
from mambactl.models.cache import HybridCache
from mambactl.models.hybrid import HybridModel

# shorter beginnings are read again: a pass of their own takes longer
LEAST_SHARED = 64


class Prefixes:
    """The beginning that prompts of several calls share, and what a model holds after it.

    A state cannot be shortened: where later prompts share less, their beginning is read anew.
    `saved` counts the tokens that were not read for the prompts, less those read in their place.
    Nothing is shared unless `share`.
    """

    def __init__(self, model: HybridModel, share: bool = True):
        self.model, self.share = model, share
        self.tokens: list[int] = []
        self.cache: HybridCache | None = None
        self.saved = 0
        self._last: Sequence[Sequence[int]] = ()

    def of(self, prompts: Sequence[Sequence[int]]) -> HybridCache | None:
        """A cache of one row that all prompts go on from; None where they share too little."""
        if not self.share:
            return None
        # each keeps a token, which gives its first new one
        most = min(map(len, prompts)) - 1
        held, shared = len(self.tokens), min(most, common(prompts))
        fits = held and held <= most and common([self.tokens, *prompts]) == held
        others, self._last = [*prompts, *self._last], prompts[-1:]
        if fits and shared < 2 * held:
            self.saved += held * len(prompts)
            return self.cache
        length = min(most, common(others))
        if length < LEAST_SHARED:
            length = shared
        if length < LEAST_SHARED or len(others) == 1:
            return None
        self.tokens = list(prompts[0][:length])
        self.cache = HybridCache(self.model.config, 1, self.model.device)
        read_in_pieces(self.model, self.cache, [self.tokens])
        self.saved += length * (len(prompts) - 1)
        return self.cache


def common(rows: Sequence[Sequence[int]]) -> int:
    """With how many of the same tokens all rows begin."""
    # what the first and the last in order begin with, those between them do
    first, last = min(map(list, rows)), max(map(list, rows))
    pairs = enumerate(zip(first, last, strict=False))
    return next((index for index, (a, b) in pairs if a != b), len(first))
