"""Heat maps inside the results of a needle probe, however they are nested."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from mambactl.json_values import AnyObject

AXES = ("lengths", "depths")


@dataclass(frozen=True)
class NeedleMap:
    """Shares from 0 to 1, a row per length of the text and a column per depth in it."""

    name: str
    lengths: Sequence[int]
    depths: Sequence[float]
    shares: list[list[float]]


def needle_maps(node: object, name: str = "", axes: AnyObject | None = None) -> Iterator[NeedleMap]:
    """Every matrix below `lengths` and `depths`; one called `scores` goes without its name.

    Rows are lengths; a matrix that fits only the other way round is turned. Numbers above 1 are per
    cent.
    """
    if not isinstance(node, Mapping):
        return
    if all(isinstance(node.get(axis), list) and _are_ticks(node[axis]) for axis in AXES):
        axes = node
    for key, inner in node.items():
        own = name if key == "scores" else f"{name} {key}".strip()
        if isinstance(inner, Mapping):
            yield from needle_maps(inner, own, axes)
        elif axes is not None and key not in AXES and (grid := _grid(inner, axes)):
            yield NeedleMap(own, axes["lengths"], axes["depths"], grid)


def _are_ticks(values: list[object]) -> bool:
    return bool(values) and all(
        isinstance(value, int | float) and math.isfinite(value) for value in values
    )


def _grid(value: object, axes: AnyObject) -> list[list[float]] | None:
    lengths, depths = (len(axes[axis]) for axis in AXES)
    if not isinstance(value, list) or not value or not all(isinstance(v, list) for v in value):
        return None
    widths = {len(row) for row in value}
    if (len(value), widths) == (depths, {lengths}) and lengths != depths:
        value = [list(row) for row in zip(*value, strict=True)]
    elif (len(value), widths) != (lengths, {depths}):
        return None
    cells = [cell for row in value for cell in row]
    if not all(isinstance(cell, int | float) for cell in cells):
        return None
    scale = 100 if max(cells) > 1 else 1
    return [[cell / scale for cell in row] for row in value]
