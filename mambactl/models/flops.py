"""Floating-point operations of forward and training passes, counted from the configuration.

A product [m, k] x [k, n] is 2 m k n operations. Attention counts the causal half of its scores, a
recurrence what its equation needs per token and state element, whatever chunks a kernel makes of
it. Norms, activations and look-ups are left out. A gradient with respect to an input, and one with
respect to a weight, cost what the forward product does.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from mambactl.models.config import HybridConfig
from mambactl.models.mixers.spec import MixerCost

# (what: a mixer or head; how: see `Work.pieces`) -> operations
Pieces = Mapping[tuple[str, str], float]


def mixer_cost(config: HybridConfig, index: int, length: int) -> MixerCost:
    """Operations of the mixer of one layer on rows of `length` tokens."""
    layer = config.layer(index)
    return layer.spec.cost(config, layer.settings, length)


def mlp_cost(config: HybridConfig) -> float:
    """Operations of one MLP per token."""
    return 6.0 * config.hidden_size * config.intermediate_size if config.has_mlp else 0.0


def head_cost(config: HybridConfig) -> float:
    """Operations of the language-model head per token."""
    return 2.0 * config.hidden_size * config.vocab_size


def forward_flops(config: HybridConfig, length: int, head: bool = True) -> float:
    """Operations per token of a forward pass over rows of `length` tokens."""
    layers = range(len(config.mixers))
    mixers = sum(mixer_cost(config, index, length).forward for index in layers)
    return mixers + len(config.mixers) * mlp_cost(config) + (head_cost(config) if head else 0.0)


@dataclass(frozen=True)
class Work:
    """What one phase computes.

    `student.mixers` are those that run, stand-ins included; `layers` those whose mixer trains;
    `rest` says that everything else trains too; `aligns` that layers are trained one by one on the
    teacher's states, with no pass through the student.
    """

    student: HybridConfig
    teacher: HybridConfig | None
    layers: tuple[int, ...]
    rest: bool = False
    aligns: bool = False
    checkpointing: bool = False

    def flops(self, rows: int, length: int) -> float:
        """Operations of a batch; those that checkpointing repeats do not count."""
        return (
            rows
            * length
            * sum(count for (_, how), count in self.pieces(length).items() if how != "repeat")
        )

    def pieces(self, length: int) -> Pieces:
        """Operations per token by what makes them.

        how is `infer` (a block, forward only), `train` (a block, both ways), `align` (a mixer by
        itself, both ways), `repeat` (a block's forward pass done again) or, for the head, `train`.
        """
        found: Counter[tuple[str, str]] = Counter()
        if self.teacher is not None:
            for index, kind in enumerate(self.teacher.kinds):
                found[kind, "infer"] += self._block(self.teacher, index, length)
        kinds = self.student.kinds
        if self.aligns:
            for index in self.layers:
                found[kinds[index], "align"] += self._aligned(index, length)
            return found
        lowest = 0 if self.rest else min(self.layers)
        for index, kind in enumerate(kinds):
            found[kind, "train"] += self._trained(index, length, index >= lowest)
            if self.checkpointing:
                found[kind, "repeat"] += self._block(self.student, index, length)
        head = head_cost(self.student)
        guide = head_cost(self.teacher) if self.teacher is not None else 0.0
        found["head", "train"] = guide + head * (3 if self.rest else 2)
        return found

    def _block(self, config: HybridConfig, index: int, length: int) -> float:
        return mixer_cost(config, index, length).forward + mlp_cost(config)

    def _aligned(self, index: int, length: int) -> float:
        # what enters a mixer is the teacher's and needs no gradient
        cost = mixer_cost(self.student, index, length)
        return 2 * cost.entrance + 3 * (cost.weights + cost.mixing)

    def _trained(self, index: int, length: int, reached: bool) -> float:
        cost, mlp = mixer_cost(self.student, index, length), mlp_cost(self.student)
        forward = cost.forward + mlp
        if not reached:
            return forward
        inputs = cost.entrance + cost.weights + mlp + 2 * cost.mixing
        weights = cost.entrance + cost.weights if self.rest or index in self.layers else 0.0
        return forward + inputs + weights + (mlp if self.rest else 0.0)
