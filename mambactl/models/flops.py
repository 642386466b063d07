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

# decay, outer product (multiply, add), read-out (multiply, add) per state element
MAMBA2_STATE = 5
# exponential and its argument too, which every channel has of its own
MAMBA1_STATE = 7

# (what: a mixer or head; how: see `Work.pieces`) -> operations
Pieces = Mapping[tuple[str, str], float]


@dataclass(frozen=True)
class MixerCost:
    """Per token: products with the input projection, with all other weights, and no weight."""

    entrance: float
    weights: float
    mixing: float

    def plus(self, other: "MixerCost") -> "MixerCost":
        """Both."""
        return MixerCost(
            self.entrance + other.entrance, self.weights + other.weights, self.mixing + other.mixing
        )

    @property
    def forward(self) -> float:
        """Operations of a forward pass."""
        return self.entrance + self.weights + self.mixing


def _attention_cost(config: HybridConfig, seen: float) -> MixerCost:
    """Attention whose queries see `seen` keys."""
    width, inner = config.hidden_size, config.num_attention_heads * config.head_dim
    shared = config.num_key_value_heads * config.head_dim
    return MixerCost(2 * width * (inner + 2 * shared), 2 * inner * width, 4 * inner * seen)


def mixer_cost(config: HybridConfig, mixer: str, length: int) -> MixerCost:
    """Operations of one token mixer on rows of `length` tokens."""
    width = config.hidden_size
    if mixer == "attention":
        return _attention_cost(config, min(length / 2, config.sliding_window or length))
    if mixer == "mamba2_window":
        span = config.mamba2_window_settings
        near = _attention_cost(config, min(length / 2, span.window + span.sinks))
        return mixer_cost(config, "mamba2", length).plus(near)
    if mixer == "mamba2":
        s2 = config.mamba2_settings
        state = MAMBA2_STATE * s2.d_inner * s2.d_state
        conv = 2 * s2.d_conv * s2.conv_dim
        return MixerCost(2 * width * sum(s2.in_rows), 2 * s2.d_inner * width, state + conv)
    s1 = config.mamba1_settings
    selected = s1.d_inner * (s1.dt_rank + 2 * s1.d_state) if s1.native else 0
    weights = 2 * (selected + s1.dt_rank * s1.d_inner + s1.d_inner * width)
    mixing = MAMBA1_STATE * s1.d_inner * s1.d_state + 2 * s1.d_conv * s1.d_inner
    return MixerCost(2 * width * sum(s1.in_rows), weights, mixing)


def mlp_cost(config: HybridConfig) -> float:
    """Operations of one MLP per token."""
    return 6.0 * config.hidden_size * config.intermediate_size if config.has_mlp else 0.0


def head_cost(config: HybridConfig) -> float:
    """Operations of the language-model head per token."""
    return 2.0 * config.hidden_size * config.vocab_size


def forward_flops(config: HybridConfig, length: int, head: bool = True) -> float:
    """Operations per token of a forward pass over rows of `length` tokens."""
    mixers = sum(mixer_cost(config, name, length).forward for name in config.mixers)
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
            for name in self.teacher.mixers:
                found[name, "infer"] += self._block(self.teacher, name, length)
        if self.aligns:
            for index in self.layers:
                name = self.student.mixers[index]
                found[name, "align"] += self._aligned(name, length)
            return found
        lowest = 0 if self.rest else min(self.layers)
        for index, name in enumerate(self.student.mixers):
            found[name, "train"] += self._trained(index, name, length, index >= lowest)
            if self.checkpointing:
                found[name, "repeat"] += self._block(self.student, name, length)
        head = head_cost(self.student)
        guide = head_cost(self.teacher) if self.teacher is not None else 0.0
        found["head", "train"] = guide + head * (3 if self.rest else 2)
        return found

    def _block(self, config: HybridConfig, name: str, length: int) -> float:
        return mixer_cost(config, name, length).forward + mlp_cost(config)

    def _aligned(self, name: str, length: int) -> float:
        # what enters a mixer is the teacher's and needs no gradient
        cost = mixer_cost(self.student, name, length)
        return 2 * cost.entrance + 3 * (cost.weights + cost.mixing)

    def _trained(self, index: int, name: str, length: int, reached: bool) -> float:
        cost, mlp = mixer_cost(self.student, name, length), mlp_cost(self.student)
        forward = cost.forward + mlp
        if not reached:
            return forward
        inputs = cost.entrance + cost.weights + mlp + 2 * cost.mixing
        weights = cost.entrance + cost.weights if self.rest or index in self.layers else 0.0
        return forward + inputs + weights + (mlp if self.rest else 0.0)
