"""Bytes that the decode engine needs for one sequence of a student, beside those of its teacher."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from mambactl import console
from mambactl.json_values import AnyObject, JsonObject
from mambactl.metrics import columns, group
from mambactl.models.cache_bytes import sequence_bytes, sequences
from mambactl.models.layout import MixerLayout

if TYPE_CHECKING:
    from mambactl.models.hybrid import HybridForCausalLM

# where results of `eval` hold them
CACHE, SEQUENCES = "cache", "sequences"


def sequences_of(
    model: "HybridForCausalLM", teacher: "HybridForCausalLM | None"
) -> dict[str, JsonObject]:
    """`models.cache_bytes.sequences` of two models as they are in memory.

    Empty for a model that runs code of its own, whose cache nobody knows.
    """
    if not isinstance(model.config, MixerLayout):
        return {}
    itemsize = model.dtype.itemsize
    if teacher is None or not isinstance(teacher.config, MixerLayout):
        return sequences(model.config, itemsize)
    theirs = teacher.config
    return sequences(
        model.config, itemsize, lambda tokens: sequence_bytes(theirs, itemsize, tokens).total
    )


def show_sequences(source: str, found: Mapping[str, AnyObject]) -> None:
    """Print a line per length."""
    numbers = columns(group("sequence"), found.values())
    lines = [
        (f"{int(tokens):,}", *(each.shown(one) for each in numbers))
        for tokens, one in found.items()
    ]
    headings = ("tokens", *(each.label for each in numbers))
    console.table(f"cache of one sequence of {source}", headings, lines)
