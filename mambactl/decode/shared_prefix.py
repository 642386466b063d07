"""Common beginnings of prompts, read once: instructions, worked examples, a document."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from mambactl.decode.prefill import read_in_pieces
from mambactl.decode.prefix_files import PrefixFiles, PrefixFolder
from mambactl.decode.stats import DecodeStats
from mambactl.models.cache import HybridCache
from mambactl.models.hybrid import HybridModel
from mambactl.present import present

# shorter beginnings are read again: a pass of their own takes longer
LEAST_SHARED = 64


class Prefixes:
    """The beginning that prompts of several calls share, and what a model holds after it.

    A state cannot be shortened: where later prompts share less, their beginning is read anew, or
    the longest is taken that a `folder` keeps. `saved` counts the tokens that were not read for the
    prompts, less those read in their place; `from_files` those that files gave. Nothing is shared
    unless `share`.
    """

    # whether it is asked about prompts that a captured graph reads whole faster than two passes
    before_graphs = False

    def __init__(self, model: HybridModel, share: bool = True, folder: PrefixFolder | None = None):
        self.model, self.share = model, share
        self.files = None if folder is None else PrefixFiles(folder, model)
        self.tokens: list[int] = []
        self.cache: HybridCache | None = None
        self.saved = self.from_files = 0
        self._given = 0
        self._last: Sequence[Sequence[int]] = ()

    @torch.no_grad()
    def of(self, prompts: Sequence[Sequence[int]]) -> HybridCache | None:
        """A cache of one row that all prompts go on from; None where they share too little."""
        if not self.share:
            return None
        # each keeps a token, which gives its first new one
        most = min(map(len, prompts)) - 1
        held, shared = len(self.tokens), min(most, common(prompts))
        fits = held and held <= most and common([self.tokens, *prompts]) == held
        others, first = [*prompts, *self._last], not self._last
        self._last = prompts[-1:]
        length = min(most, common(others))
        if length < LEAST_SHARED and len(prompts) > 1:
            length = shared
        if length < LEAST_SHARED or len(others) == 1:
            length = 0
        if fits and (shared < 2 * held or 0 < length <= held):
            self._count(len(prompts), held)
            return self.cache
        if self.files is None:
            return self._read(prompts, [length], None)
        if shared < LEAST_SHARED:
            return None
        start = prompts[0][:shared]
        cache = self.files.longest(start)
        ends = [length, shared if first else 0]
        if shared - (0 if cache is None else cache.seen) >= LEAST_SHARED:
            ends.append(self._branch(start))
        return self._read(prompts, ends, cache)

    @contextmanager
    def counted(self, stats: DecodeStats) -> Iterator[None]:
        """Add the tokens that the calls in the block share, and those from files."""
        saved, from_files = self.saved, self.from_files
        yield
        stats.prompt_shared += self.saved - saved
        stats.prompt_from_files += self.from_files - from_files

    def _read(
        self, prompts: Sequence[Sequence[int]], ends: Sequence[int], cache: HybridCache | None
    ) -> HybridCache | None:
        """Hold the beginning up to the last of `ends`, read on from `cache`; keep it at each."""
        given = at = 0 if cache is None else cache.seen
        if cache is None:
            cache = HybridCache(self.model.config, 1, self.model.device)
        for end in sorted(ends):
            if end - at >= LEAST_SHARED:
                read_in_pieces(self.model, cache, [prompts[0][at:end]])
                at = end
                if self.files is not None:
                    self.files.keep(prompts[0][:end], cache)
        if not at:
            return None
        self.tokens, self.cache, self._given = list(prompts[0][:at]), cache, given
        self._count(len(prompts), at, read=at - given)
        return cache

    def _count(self, prompts: int, held: int, read: int = 0) -> None:
        self.saved += held * prompts - read
        self.from_files += self._given * prompts

    def _branch(self, start: Sequence[int]) -> int:
        """Length of the longest beginning that `start` shares with another kept one."""
        return max((common([start, ids]) for ids in present(self.files).recent()), default=0)

    def ended(
        self, prompts: Sequence[Sequence[int]], tokens: Sequence[Sequence[int]], cache: HybridCache
    ) -> None:
        """Ignore the tokens written behind prompts and the cache that read them."""


def common(rows: Sequence[Sequence[int]]) -> int:
    """Number of tokens with which all rows begin alike."""
    # what the first and the last in order begin with, those between them do
    first, last = min(map(list, rows)), max(map(list, rows))
    pairs = enumerate(zip(first, last, strict=False))
    return next((index for index, (a, b) in pairs if a != b), len(first))
