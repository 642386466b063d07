"""Units that may keep attention: whole layers, or single KV heads, chosen by rule or by hand."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

from mambactl.conversion.replace import Kept, attention_bytes, attention_to_keep, kept_attention
from mambactl.errors import UsageError
from mambactl.models.config import HybridConfig
from mambactl.options import ConvertConfig
from mambactl.options.fields import head_numbers

# share of the layers below the middle of those that retrieve: first layers need a window alone. Of
# SmolLM2's 90 KV heads the 45 around it, untrained, recall 47 % of key-value pairs at 256 tokens
# with a KL of 0.06; spread over all layers 16 % and 0.11 (teacher 89 %)
RETRIEVAL_DEPTH = 0.6


@dataclass(frozen=True, order=True)
class Unit:
    """KV heads of one layer that keep or lose attention together."""

    layer: int
    heads: tuple[int, ...]
    name: int | str


def kept_by(units: Iterable[Unit]) -> Kept:
    """The KV heads of some units, by layer."""
    found: dict[int, set[int]] = {}
    for unit in units:
        found.setdefault(unit.layer, set()).update(unit.heads)
    return {layer: tuple(sorted(heads)) for layer, heads in found.items()}


class Units(ABC):
    """One way to divide attention: the units of a model, and how many of them stay."""

    # what a unit is called
    word: ClassVar[str]

    @abstractmethod
    def of(self, base: HybridConfig) -> list[Unit]:
        """The attention of a model, in the order of its layers."""

    @abstractmethod
    def size(self, base: HybridConfig, itemsize: int) -> int:
        """Bytes of the keys and values that a unit keeps of one token."""

    @abstractmethod
    def count(self, config: ConvertConfig, base: HybridConfig, itemsize: int) -> int:
        """Number of units to keep: what the ratio leaves, or what fits in the budget."""

    @abstractmethod
    def chosen(self, config: ConvertConfig, base: HybridConfig, itemsize: int) -> list[Unit]:
        """The units that stay if nothing is measured; raises UsageError for unknown ones."""


class Layers(Units):
    """Division of attention into whole layers."""

    word = "layer"

    def of(self, base: HybridConfig) -> list[Unit]:
        """The layers that are attention alone."""
        heads = base.attention_heads
        return [Unit(index, heads[index], index) for index in base.attention_layers]

    def size(self, base: HybridConfig, itemsize: int) -> int:
        """Bytes of the keys and values that a layer keeps of one token."""
        return attention_bytes(base, itemsize)

    def count(self, config: ConvertConfig, base: HybridConfig, itemsize: int) -> int:
        """Number of layers that stay attention."""
        return attention_to_keep(base, config.ratio, config.kv_budget, itemsize)

    def chosen(self, config: ConvertConfig, base: HybridConfig, itemsize: int) -> list[Unit]:
        """The layers that the options name, or as the released models keep them."""
        attention = base.attention_layers
        if config.kv_budget is None or config.keep_attention is not None:
            kept = kept_attention(base.num_hidden_layers, config.ratio, config.keep_attention)
        else:
            ratio = 1 - self.count(config, base, itemsize) / max(1, len(attention))
            kept = [attention[index] for index in kept_attention(len(attention), ratio)]
        return [unit for unit in self.of(base) if unit.layer in kept]


class Heads(Units):
    """Division of attention into single KV heads, each with the query heads that share it."""

    word = "head"

    def of(self, base: HybridConfig) -> list[Unit]:
        """The KV heads of all layers that are attention alone."""
        return [
            Unit(index, (head,), f"{index}.{head}")
            for index in base.attention_layers
            for head in base.attention_heads[index]
        ]

    def size(self, base: HybridConfig, itemsize: int) -> int:
        """Bytes of the keys and values that a head keeps of one token."""
        return 2 * base.head_dim * itemsize

    def count(self, config: ConvertConfig, base: HybridConfig, itemsize: int) -> int:
        """Number of heads to choose, less those that earlier conversions kept beside mixers."""
        beside = sum(
            len(heads)
            for index, heads in base.attention_heads.items()
            if index not in base.attention_layers
        )
        if config.kv_budget is not None:
            wanted = config.kv_budget // self.size(base, itemsize)
        else:
            every = base.num_hidden_layers * base.num_key_value_heads
            wanted = every - rounded_half_up(config.ratio, every)
        return min(max(0, wanted - beside), len(self.of(base)))

    def chosen(self, config: ConvertConfig, base: HybridConfig, itemsize: int) -> list[Unit]:
        """The heads that the options name, or as many in the middle of the model."""
        units = self.of(base)
        if config.keep_heads is None:
            return self._by_rule(units, base, self.count(config, base, itemsize))
        asked = head_numbers(config.keep_heads)
        _require_heads(asked, base)
        return [unit for unit in units if (unit.layer, *unit.heads) in asked]

    @staticmethod
    def _by_rule(units: list[Unit], base: HybridConfig, keep: int) -> list[Unit]:
        """The `keep` units nearest to `RETRIEVAL_DEPTH`; of two as near, the deeper one."""

        def distance(unit: Unit) -> float:
            return abs((unit.layer + 0.5) / base.num_hidden_layers - RETRIEVAL_DEPTH)

        nearest = sorted(units, key=lambda unit: (distance(unit), -unit.layer, unit.heads))
        return sorted(nearest[:keep])


UNITS: dict[str, Units] = {units.word: units for units in (Layers(), Heads())}


def rounded_half_up(ratio: float, count: int) -> int:
    """ratio x count, rounded; the ratio as it is written, so that 0.35 of 10 is 4."""
    return math.floor(Fraction(str(ratio)) * count + Fraction(1, 2))


def _require_heads(asked: list[tuple[int, int]], base: HybridConfig) -> None:
    """Raise UsageError for KV heads that the model has not, or that are named twice."""
    layers, heads = base.num_hidden_layers, base.num_key_value_heads
    valid = f"KV heads are 0.0 to {layers - 1}.{heads - 1}: LAYER.HEAD, {layers} layers of {heads}"
    for layer, head in asked:
        name = f"{layer}.{head}"
        if layer >= layers or head >= heads:
            raise UsageError(f"there is no KV head {name} in this model", valid)
        if asked.count((layer, head)) > 1:
            raise UsageError(f"--keep-heads names {name} twice", f"name each once; {valid}")
