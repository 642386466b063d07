"""The contract of a mixer: everything that the rest of the program asks of one.

A mixer is a module, the settings that size it, and one `MixerSpec`. Configuration, cache,
conversion, closed-form fit, training, cost, checkpoints and decoding call the spec's methods and
know no mixer by name. `mambactl.models.mixers.registry.MIXERS` holds one spec per mixer.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Generic, Protocol, TypeAlias, TypeVar, cast

import torch
from torch import Tensor, nn

from mambactl.kernels.local_attention import LocalKeys, LocalSpan
from mambactl.kernels.reference import Spans
from mambactl.models.cache import MAX_SEQUENTIAL, Cursor, LayerCache
from mambactl.models.mixers.settings import WindowSettings
from mambactl.models.mixers.sizes import HeadSizes, MixerSizes
from mambactl.models.packed import AnyPacked, NotSupported, Rotations
from mambactl.models.ragged import AttentionMaps
from mambactl.present import present

S = TypeVar("S")
# the module of a mixer
W = TypeVar("W", bound=nn.Module)
V = TypeVar("V")


class DecoderConfig(HeadSizes, Protocol):
    """Fields of a configuration that modules of mixers depend on."""

    @property
    def hidden_size(self) -> int: ...

    @property
    def rms_norm_eps(self) -> float: ...

    @property
    def attention_bias(self) -> bool | list[str]: ...

    @property
    def attention_dropout(self) -> float | int | None: ...

    @property
    def qk_norm(self) -> bool | str: ...

    @property
    def query_factor(self) -> float: ...

    @property
    def sliding_window(self) -> int | None: ...

    def rotated(self, index: int) -> bool: ...


@dataclass(frozen=True)
class StepContext:
    """Positions [B, T], rotary (cos, sin), and which keys attention sees.

    Those are in `mask` [B, 1, T, S] or in `spans`; where both are None, all of the past. A window
    beside a recurrence sees `local`. All is made once per call of the model, for every layer.
    `seq_idx` [B, T] separates packed documents, `n_new` [B] makes rows ragged, `slots` is the
    number of key slots attention may read, `cursor` is None without a cache, and `level` says that
    all rows with new tokens hold equally many before them. Attention keeps its weights
    [B, H, T, S] in `maps` if there are any. Where one norm is of heads in several attentions,
    `head_squares` [2, B, T, 1] are the mean squares of all their queries and keys.
    """

    positions: Tensor
    rotary: tuple[Tensor, Tensor] | None
    mask: Tensor | None
    seq_idx: Tensor | None = None
    n_new: Tensor | None = None
    slots: int = 0
    cursor: Cursor | None = None
    first: bool = False
    level: bool = False
    spans: Spans | None = None
    local: Mapping[LocalSpan, LocalKeys] | None = None
    maps: AttentionMaps | None = None
    head_squares: Tensor | None = None

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> "StepContext":
        """Copy the context to another device; accelerate moves the arguments of a layer."""
        return _moved(self, torch.device(device), non_blocking)

    def continues(self, span: LocalSpan) -> bool:
        """True if tokens, with the sinks and the window in front, can be read as a whole row."""
        length = self.positions.shape[1]
        return self.level and length > span.before and self.slots - length >= span.before

    @property
    def at(self) -> Cursor:
        """The cursor of a call with a cache."""
        return present(self.cursor)

    @property
    def angles(self) -> tuple[Tensor, Tensor]:
        """Cosines and sines of a model that rotates."""
        return present(self.rotary)

    @property
    def sequential(self) -> bool:
        """True if recurrent layers go token by token, on the route that rolls back exactly."""
        return goes_sequentially(self.positions.shape[1], self.cursor, self.first)


def _moved(value: V, device: torch.device, non_blocking: bool) -> V:
    """A context or a part of one with its tensors on `device`."""
    return _moved_part(value, device, non_blocking)


def _moved_part(value: Any, device: torch.device, non_blocking: bool) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=non_blocking)
    if isinstance(value, Mapping):
        return {key: _moved(part, device, non_blocking) for key, part in value.items()}
    if isinstance(value, tuple):
        parts = [_moved(part, device, non_blocking) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    if isinstance(value, StepContext | Cursor):
        parts = {part.name: getattr(value, part.name) for part in fields(value)}
        return replace(value, **_moved(parts, device, non_blocking))
    return value


def goes_sequentially(length: int, cursor: Cursor | None, first: bool) -> bool:
    """True for one token, and for several where a rollback may follow; prompts go in chunks."""
    if cursor is None:
        return False
    return length == 1 or (cursor.recording and not first and length <= MAX_SEQUENTIAL)


# half-life in tokens -> what a head can mix, R tensors [B, T, H, P]
Basis = Callable[[float], list[Tensor]]
# name of a section of the configuration -> its fields
Sections = dict[str, dict[str, object]]


@dataclass(frozen=True)
class MixerForm:
    """Options of `convert` that decide the form of new mixers.

    init is `calibrated` or `reference`, `window` 0 without attention beside the recurrence; `kept`
    are the KV heads that keep full attention.
    """

    init: str = "reference"
    window: int = 0
    sinks: int | None = None
    rotary: bool = False
    kept: tuple[int, ...] = ()

    @property
    def calibrated(self) -> bool:
        """True if the mixer starts as decayed linear attention."""
        return self.init == "calibrated"

    def biased(self, config: DecoderConfig) -> bool:
        """True if its projections have biases: to calibrate them, or to take the attention's."""
        return self.calibrated or bool(config.attention_bias)


@dataclass(frozen=True)
class AttentionWeights:
    """One attention layer: projections [rows, D], o [D, H P], biases or None.

    `norm` [D] is the expected rms of its input: the weight of the norm in front of it.

    `head_norms` are weights of norms that q and k pass on their way to the heads: [P], of each
    head, or [rows], of all together. `score` is what scores are multiplied by beside 1 / sqrt(P).
    """

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    norm: Tensor
    biases: dict[str, Tensor] | None = None
    head_norms: dict[str, Tensor] | None = None
    score: float = 1.0

    def linear(self, name: str) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of q, k, v or o as the linear map that a mixer can take over.

        A norm on heads then divides by the rms that is expected, not by that of each token.
        """
        weight, bias = getattr(self, name), (self.biases or {}).get(name)
        gain = (self.head_norms or {}).get(name)
        factor = self.score if name == "q" else 1.0
        if gain is None and factor == 1:
            return weight, bias
        scale = weight.new_full(weight.shape[:1], factor)  # [rows]
        if gain is not None:
            scale = scale * (gain / self._rms(weight, len(gain))[:, None]).flatten()
        return weight * scale[:, None], None if bias is None else bias * scale

    def of_heads(self, chosen: Sequence[int], kv_heads: int) -> "AttentionWeights":
        """The part of some of the `kv_heads` KV heads and of the query heads that share them."""

        def rows(tensor: Tensor, dim: int = 0) -> Tensor:
            parts = tensor.unflatten(dim, (kv_heads, -1))
            index = torch.tensor(chosen, dtype=torch.long, device=tensor.device)
            return parts.index_select(dim, index).flatten(dim, dim + 1)

        biases = {n: b if n == "o" else rows(b) for n, b in (self.biases or {}).items()}
        cut = {name: rows(getattr(self, name)) for name in "qkv"}
        norms = {
            name: rows(gain) if self.is_joint(name) else gain
            for name, gain in (self.head_norms or {}).items()
        }
        return replace(self, **cut, o=rows(self.o, 1), biases=biases, head_norms=norms)

    def is_joint(self, name: str) -> bool:
        """True if one norm is of all heads of q or k."""
        return len(present(self.head_norms)[name]) == len(getattr(self, name))

    def heads(self, name: str, hidden: Tensor, width: int) -> Tensor:
        """Projection `name` of hidden [B, T, D], by heads [B, T, heads, width]."""
        return nn.functional.linear(hidden, *self.linear(name)).unflatten(-1, (-1, width))

    def rms(self, name: str, width: int) -> Tensor:
        """Expected rms of each of its heads [heads], for a normed input of unit variance."""
        return self._rms(self.linear(name)[0], width)

    def _rms(self, weight: Tensor, width: int) -> Tensor:
        energy = (weight.float() * self.norm.float()).pow(2).sum(1)  # [rows]
        return energy.view(-1, width).mean(1).sqrt().clamp(min=1e-6)


@dataclass(frozen=True)
class HeadFit:
    """Decayed linear attention of every query head, all [H].

    half_life in tokens, constant c, score a (of q.k / sqrt(P)), skip d, and the rms of the
    resulting head output.
    """

    half_life: Tensor
    constant: Tensor
    score: Tensor
    skip: Tensor
    rms: Tensor


@dataclass(frozen=True)
class MixerCost:
    """Operations per token: products with the input projection, with other weights, with none.

    `lookup` are those of the input projection that make queries and keys of kept heads.
    """

    entrance: float
    weights: float
    mixing: float
    lookup: float = 0.0

    def plus(self, other: "MixerCost") -> "MixerCost":
        """Sum of two costs, part by part."""
        return MixerCost(
            self.entrance + other.entrance,
            self.weights + other.weights,
            self.mixing + other.mixing,
            self.lookup + other.lookup,
        )

    @property
    def forward(self) -> float:
        """Operations of a forward pass."""
        return self.entrance + self.weights + self.mixing


class Mixer(Protocol):
    """Module of a mixer that replaces attention.

    `features` is the input of `out_proj`, on which the closed-form fit regresses.
    """

    out_proj: nn.Linear

    def __call__(
        self, hidden: Tensor, context: StepContext, cache: LayerCache | None
    ) -> Tensor: ...

    def features(
        self, hidden: Tensor, context: StepContext, cache: LayerCache | None = None
    ) -> Tensor: ...


def span_of(config: DecoderConfig, window: WindowSettings) -> LocalSpan:
    """Span of a window in a model with these heads."""
    shared = config.num_attention_heads // config.num_key_value_heads
    return LocalSpan(window.window, window.sinks, shared)


class MixerSpec(MixerSizes[S], ABC, Generic[S, W]):
    """One mixer; `S` is the dataclass of its settings, of one layer, `W` its module."""

    # built from (config, settings), unless `module` is overridden
    module_type: ClassVar[type[nn.Module]]
    # attribute of the block that holds the module, and so a part of its tensors' names
    attribute: ClassVar[str] = "mamba"
    # as a sentence calls it, without an article
    title: ClassVar[str] = "mixer"
    # as listings of parameters call it
    label: ClassVar[str] = "mamba mixers"
    # its submodules that tensor parallelism cuts, and how
    tensor_parallel: ClassVar[Mapping[str, str]] = {}
    # submodules made of the teacher's own weights (train like the rest of the model) -> label
    inherited: ClassVar[Mapping[str, str]] = {}
    # submodule with heads that attend to all of the past as the teacher's do; "" is the whole mixer
    keeps: ClassVar[str | None] = None
    # branch that can be silenced -> the submodule whose output it is; "" is the whole mixer
    branches: ClassVar[Mapping[str, str]] = {"recurrent": "out_proj"}
    # name of the mixer that has a window of attention beside this one
    with_window: ClassVar[str | None] = None
    # name of the mixer that does the same for some KV heads, and keeps full attention for others
    with_kept_heads: ClassVar[str | None] = None
    # whether GraniteMoeHybrid, which other engines know, has such layers
    in_granite: ClassVar[bool] = False
    # whether its states can rotate with the position (`convert --rotary`)
    can_rotate: ClassVar[bool] = False
    # whether every head is fitted (`basis`, `apply_fit`) before the output projection is
    fits_heads: ClassVar[bool] = True
    # whether a weight of its own scales every head's output (`rescale`)
    rescales_heads: ClassVar[bool] = False

    # settings

    def local_span(self, config: DecoderConfig, settings: S) -> LocalSpan | None:
        """Keys that the window sees, in a model of these heads."""
        window = self.window(settings)
        return None if window is None else span_of(config, window)

    def has_positions(self, settings: S) -> bool:
        """True if positions bound the text that the mixer can read."""
        return self.is_attention or self.rotates(settings) or self.window(settings) is not None

    # module and cache

    def module(self, config: DecoderConfig, settings: S, rotated: bool = True) -> W:
        """The module of one layer, whose attention has rotary positions if `rotated`."""
        return self.built(config, settings)

    def built(self, config: DecoderConfig, settings: S, **options: object) -> W:
        """Build `module_type` for a configuration and its settings."""
        # a class variable cannot name the type of the class
        build = cast(Callable[..., W], self.module_type)
        return build(config, settings, **options)

    @abstractmethod
    def cache(self, settings: S) -> LayerCache:
        """An empty cache of one layer."""

    # conversion

    def from_attention(self, config: DecoderConfig, form: MixerForm, index: int) -> S:
        """Settings of a mixer in the place of the attention of layer `index`.

        Raises UsageError or ModelError where this attention cannot be replaced by it.
        """
        raise NotImplementedError

    def initialise(
        self, mixer: W, attention: AttentionWeights, method: str, generator: torch.Generator
    ) -> None:
        """Fill a new mixer in place from the attention it replaces; nothing needs a gradient."""
        raise NotImplementedError

    def basis(
        self, mixer: W, attention: AttentionWeights, hidden: Tensor, context: StepContext
    ) -> Basis:
        """The parts that each head mixes for hidden [B, T, D]: v, score and maybe a constant."""
        raise NotImplementedError

    def apply_fit(self, mixer: W, attention: AttentionWeights, fit: HeadFit) -> None:
        """Write a fit of every head into a mixer that `initialise` has filled."""
        raise NotImplementedError

    def rescale(self, mixer: W, scale: Tensor) -> None:
        """Multiply each head's output by scale [H], of mixers with `rescales_heads`."""
        raise NotImplementedError

    def beside(self, mixer: W, hidden: Tensor, context: StepContext) -> Tensor | None:
        """Heads [B, T, H P] of the attention beside the recurrence, which it need not learn."""
        return None

    def recurrent(self, mixer: W, hidden: Tensor, context: StepContext) -> Tensor:
        """Output [B, T, D] of the recurrence, without what stands beside it."""
        return mixer(hidden, context, None)

    def given(self, mixer: W, hidden: Tensor, context: StepContext) -> Tensor | None:
        """Output [B, T, D] of the attention beside the recurrence, which need not learn it."""
        return None

    def recurrent_heads(self, mixer: W, heads: Tensor) -> Tensor:
        """Heads that the recurrence replaces, out of the attention's heads [B, T, H P]."""
        return heads

    def narrowed(self, config: DecoderConfig, settings: Any, kept: tuple[int, ...]) -> S:
        """Settings in place of a mixer with `settings` of its own, of which KV heads are `kept`."""
        return settings

    def taken(
        self,
        tensors: Mapping[str, Tensor],
        theirs: tuple["AnySpec", Any],
        ours: S,
        config: DecoderConfig,
        attention: AttentionWeights,
    ) -> dict[str, Tensor]:
        """Tensors of a mixer made of those of another in its place (spec and settings `theirs`).

        The other may stand for more heads than this one; `attention` is what both replace.
        """
        return dict(tensors)

    def start_fit(self, mixer: W, attention: AttentionWeights) -> None:
        """Prepare a mixer for the closed-form fit of its output projection."""

    # cost and sizes

    @abstractmethod
    def cost(self, config: DecoderConfig, settings: S, length: int) -> MixerCost:
        """Operations per token on rows of `length` tokens."""

    def kv_read(self, config: DecoderConfig, settings: S, context: int) -> int:
        """Numbers of keys and values that a step behind `context` tokens reads."""
        return 0

    # decoding

    def pack(
        self, mixer: W, config: DecoderConfig, settings: S, rotations: Rotations | None
    ) -> AnyPacked:
        """Weights for the decode kernels; NotSupported where they cannot run this mixer."""
        raise NotSupported(f"{self.name} layers")


# a row of the table of mixers: only it and the settings beside it together have a type
AnySpec: TypeAlias = MixerSpec[Any, Any]
