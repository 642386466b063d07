"""Ways in which tests of matrix products run the operations in Triton."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import NamedTuple

import torch

from mambactl.kernels.decode.triton.gemv import Tiles
from mambactl.kernels.decode.triton.ops import TritonOps


class Steps(TritonOps):
    """The tables' ways with K in several steps, as models have it."""

    def _tiles(self, name: str, rows: int) -> Tiles | None:
        tiles = super()._tiles(name, rows)
        return tiles and replace(tiles, columns=16, depth=16 if tiles.slices else 64)


class Case(NamedTuple):
    """Operations, how many rows they have, precision, and whether there is a bias."""

    ops: TritonOps
    M: int
    kind: torch.dtype
    bias: bool


WAYS: Mapping[str, Callable[[], TritonOps]] = {
    "fast": TritonOps,
    "exact": lambda: TritonOps(exact=True),
    "steps": Steps,
}
