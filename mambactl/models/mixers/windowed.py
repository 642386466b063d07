"""Mamba-2 beside the attention it replaces, of which a window and sinks remain.

    out = mamba2(u) + attention(u; the last W tokens and the first S of the document)
The window is made of the teacher's projections, so the layer may start as the teacher under that
window, and its state learns what lies beyond.
"""

from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from mambactl.kernels.local_attention import (
    LocalKeys,
    attend_behind,
    attend_locally,
    local_keys,
)
from mambactl.models.cache import WindowedCache
from mambactl.models.mixers.attention import (
    AttentionHeads,
    PackedAttention,
    attention_cost,
    copy_attention,
    pack_attention,
    projected_rotation,
    settle,
)
from mambactl.models.mixers.mamba2 import Mamba2Mixer, Mamba2Spec
from mambactl.models.mixers.mamba2_decode import PackedMamba2
from mambactl.models.mixers.settings import WindowedSettings, WindowSettings
from mambactl.models.mixers.sizes import BesideSizes, WindowedSizes
from mambactl.models.mixers.spec import (
    AttentionWeights,
    Basis,
    DecoderConfig,
    HeadFit,
    MixerCost,
    MixerForm,
    MixerSpec,
    StepContext,
    span_of,
)
from mambactl.models.packed import (
    AttentionState,
    PassContext,
    Projection,
    RecurrentState,
    Residual,
    Rotations,
    Segment,
    stack,
    sum_of_biases,
)
from mambactl.models.prompt_ends import PromptEnds
from mambactl.models.session_size import StateSize
from mambactl.present import present

RECURRENCE = Mamba2Spec()


class WindowAttention(AttentionHeads):
    """Attention with sinks whose cache is a ring."""

    def __init__(
        self,
        config: DecoderConfig,
        settings: WindowSettings,
        kv_heads: int | None = None,
        rotated: bool = True,
    ):
        super().__init__(config, kv_heads, rotated=rotated)
        self.span = span_of(config, settings)

    def forward(self, hidden: Tensor, context: StepContext, cache: WindowedCache | None) -> Tensor:
        """hidden [B, T, D] -> [B, T, D]."""
        return self.o_proj(self.features(hidden, context, cache))

    def features(
        self, hidden: Tensor, context: StepContext, cache: WindowedCache | None = None
    ) -> Tensor:
        """The input of o_proj [B, T, H P]."""
        q, k, v = self._heads(hidden, context, whole=cache is None)
        if cache is None:
            return attend_locally(q, k, v, self._keys(context), self.dropped).flatten(2)
        start, cursor = context.positions[:, 0], context.at
        if context.first and not context.sequential:
            y = attend_locally(q, k, v, self._keys(context))
        else:
            keys = self._keys(context) if context.continues(self.span) else None
            held = cache.before(k, v, start)
            y = attend_behind(q, *held, start, self.span, keys, context.sequential)
        revocable = 0
        if cursor.recording and context.sequential:
            revocable = k.shape[2] + (0 if cursor.settle else int(cursor.held.max()))
        cache.write(k, v, start, context.n_new, revocable)
        return y.flatten(2)

    def _keys(self, context: StepContext) -> LocalKeys:
        """Keys from the context, which has them for all layers of its own model."""
        if context.local is not None and self.span in context.local:
            return context.local[self.span]
        # a context of another model, a teacher's say
        positions = context.positions
        batch, length = positions.shape
        return local_keys(batch, length, *self.span, context.seq_idx, positions.device)


class Mamba2WindowMixer(Mamba2Mixer):
    """A Mamba-2 mixer plus `window`, attention to the nearest tokens."""

    def __init__(
        self,
        config: DecoderConfig,
        settings: WindowedSettings,
        kv_heads: int | None = None,
        rotated: bool = True,
    ):
        super().__init__(config, settings.mamba2)
        self.window = WindowAttention(config, settings.mamba2_window, kv_heads, rotated)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, hidden: Tensor, context: StepContext, cache: WindowedCache | None
    ) -> Tensor:
        """hidden [B, T, D] -> [B, T, D]."""
        return super().forward(hidden, context, cache) + self.window(hidden, context, cache)

    def recurrent(self, hidden: Tensor, context: StepContext) -> Tensor:
        """Output [B, T, D] of Mamba-2 alone, for whole rows."""
        return super().forward(hidden, context, None)

    def given(self, hidden: Tensor, context: StepContext) -> Tensor:
        """Output [B, T, D] of the window alone, for whole rows."""
        return self.window(hidden, context, None)


def keys_in(span: WindowSettings, context: int) -> int:
    """Tokens behind which a query of the window sees keys, of `context` before it."""
    return min(context, span.window - 1 + span.sinks)


@dataclass(frozen=True)
class PackedWindowed:
    """A Mamba-2 recurrence and the attention beside it, in a decode pass.

    Rows of `inner` are the recurrence's, then queries, keys and values; `bias` is that of both
    output projections.
    """

    inner: Projection
    recurrence: PackedMamba2
    window: PackedAttention
    bias: Tensor | None

    @property
    def attentions(self) -> tuple[PackedAttention, ...]:
        """Attentions beside the recurrence, in the order of their rows in `inner`."""
        return (self.window,)

    def states(self, state: RecurrentState) -> tuple[AttentionState, ...]:
        """Cached keys and values of the window."""
        return (present(state.window),)

    @property
    def attention(self) -> PackedAttention:
        """The attention that needs the most scratch."""
        return max(self.attentions, key=lambda part: part.kv_heads)

    @property
    def activations(self) -> int:
        """Columns of the widest buffer that a row needs: all parts lie in it at once."""
        return self.recurrence.activations + sum(part.activations for part in self.attentions)

    def new_state(self, like: Tensor, size: StateSize) -> RecurrentState:
        """Empty rings and state of both parts."""
        state = self.recurrence.new_state(like, size)
        state.window = self.window.new_ring(like, size)
        return state

    def lend(self, state: RecurrentState, cache: WindowedCache) -> None:
        """Do nothing: the keys of a window move on."""

    def load(self, state: RecurrentState, cache: WindowedCache, ends: PromptEnds) -> None:
        """Take over the state, the inputs of the convolution and the window's keys."""
        self.recurrence.load(state, cache, ends)
        self.window.load_ring(present(state.window), cache, ends)

    def run(
        self,
        context: PassContext,
        state: RecurrentState,
        s: Residual,
        segment: Segment,
        gain: Tensor,
    ) -> None:
        """Add the outputs of all parts, which read the same stream, to it."""
        rows = segment.rows
        widths = [rows * part.activations for part in (self.recurrence, *self.attentions)]
        # gates and queries in one buffer, inputs of the output projections in another
        (z, *queries), (mixed, *heads) = (
            flat[: sum(widths)].split(widths) for flat in (s.wide, s.mixed)
        )
        beside = [
            part.arguments(context, own, q, out)
            for part, own, q, out in zip(
                self.attentions, self.states(state), queries, heads, strict=True
            )
        ]
        z, mixed = (flat.view(rows, -1) for flat in (z, mixed))
        self.recurrence.mix(
            context, state, s, segment, z, mixed, self.inner, beside,
            rotation=projected_rotation(context, self.window),
            settle=partial(settle, context, segment, self.attentions, beside),
        )  # fmt: skip
        context.ops.add_residual(
            mixed, self.recurrence.out.weight, self.bias, s.hidden, gain, s.scaled, s.squares,
            beside=[
                (args.out, part.out.weight)
                for args, part in zip(beside, self.attentions, strict=True)
            ],
        )  # fmt: skip


def stack_inputs(mixer: "Mamba2WindowMixer", *attentions: AttentionHeads) -> Projection:
    """The input projections of a mixer and of the attentions in it as one.

    To be called first: what else stacks a part of it then finds it stacked, and copies nothing.
    """
    heads = [part for each in attentions for part in (each.q_proj, each.k_proj, each.v_proj)]
    return stack([mixer.in_proj, *heads])


def pack_parts(
    mixer: "Mamba2WindowMixer",
    config: DecoderConfig,
    settings: WindowedSettings,
    rotations: Rotations | None,
) -> tuple[PackedMamba2, PackedAttention, Tensor | None]:
    """The recurrence and the window for the decode kernels, and the sum of their output biases."""
    span = settings.mamba2_window
    recurrence = RECURRENCE.pack(mixer, config, settings.mamba2, rotations)
    window = pack_attention(mixer.window, config, span.window, span.sinks)
    return recurrence, window, sum_of_biases(recurrence.out, window.out)


S = TypeVar("S", bound=WindowedSettings)
W = TypeVar("W", bound=Mamba2WindowMixer)


class BesideSpec(BesideSizes[S], MixerSpec[S, W]):
    """Mamba-2 beside attention to a window, alone or beside kept heads."""

    can_rotate = True
    rescales_heads = True

    def module(self, config: DecoderConfig, settings: S, rotated: bool = True) -> W:
        """The module of one layer."""
        return self.built(config, settings, rotated=rotated)

    def initialise(
        self,
        mixer: W,
        attention: AttentionWeights,
        method: str,
        generator: torch.Generator,
    ) -> None:
        """Fill a mixer in place; calibrated, its recurrence starts silent beside the window."""
        RECURRENCE.initialise(mixer, attention, method, generator)
        copy_attention(mixer.window, attention)
        if method != "reference":
            mixer.out_proj.weight.zero_()
            mixer.out_proj.bias.zero_()

    def basis(
        self, mixer: W, attention: AttentionWeights, hidden: Tensor, context: StepContext
    ) -> Basis:
        """Basis of the closed-form fit: each head's v, and its scored and plain running sums."""
        return RECURRENCE.basis(mixer, attention, hidden, context)

    def apply_fit(self, mixer: W, attention: AttentionWeights, fit: HeadFit) -> None:
        """Write a fit of every head into the recurrence."""
        RECURRENCE.apply_fit(mixer, attention, fit)

    def rescale(self, mixer: W, scale: Tensor) -> None:
        """Multiply each head's norm weight by scale [H]."""
        RECURRENCE.rescale(mixer, scale)

    def beside(self, mixer: W, hidden: Tensor, context: StepContext) -> Tensor:
        """Heads [B, T, H P] of the window."""
        return mixer.window.features(hidden, context)

    def recurrent(self, mixer: W, hidden: Tensor, context: StepContext) -> Tensor:
        """Output [B, T, D] of Mamba-2 alone."""
        return mixer.recurrent(hidden, context)

    def given(self, mixer: W, hidden: Tensor, context: StepContext) -> Tensor:
        """Output [B, T, D] of the attention beside it."""
        return mixer.given(hidden, context)

    def start_fit(self, mixer: W, attention: AttentionWeights) -> None:
        """Give the silent output projection the attention's weights to refit."""
        mixer.out_proj.weight.copy_(attention.o)

    def cost(self, config: DecoderConfig, settings: S, length: int) -> MixerCost:
        """Operations per token of both parts."""
        span = settings.mamba2_window
        near = attention_cost(config, min(length / 2, span.window + span.sinks))
        return RECURRENCE.cost(config, settings.mamba2, length).plus(near)

    def kv_read(self, config: DecoderConfig, settings: S, context: int) -> int:
        """Numbers of keys and values that a step behind `context` tokens reads."""
        seen = keys_in(settings.mamba2_window, context)
        return seen * self.kv_elements(config, settings)


def windowed_sizes(config: DecoderConfig, form: MixerForm, index: int) -> WindowedSettings:
    """Sizes in the place of the attention of layer `index`."""
    sizes = {"window": form.window}
    if form.sinks is not None:
        sizes["sinks"] = form.sinks
    recurrence = RECURRENCE.from_attention(config, form, index)
    return WindowedSettings(recurrence, WindowSettings(**sizes))


class Mamba2WindowSpec(WindowedSizes, BesideSpec[WindowedSettings, Mamba2WindowMixer]):
    """Mamba-2 beside attention to a window."""

    title = "Mamba-2 mixer plus attention"
    module_type = Mamba2WindowMixer
    inherited = {"window": "windows of mamba mixers"}
    branches = {"recurrent": "out_proj", "window": "window"}
    with_kept_heads = "mamba2_mixed"

    def cache(self, settings: WindowedSettings) -> WindowedCache:
        """An empty cache of one layer."""
        return WindowedCache(settings.mamba2_window)

    def from_attention(
        self, config: DecoderConfig, form: MixerForm, index: int
    ) -> WindowedSettings:
        """Sizes in the place of the attention of layer `index`."""
        return windowed_sizes(config, form, index)

    def pack(
        self,
        mixer: Mamba2WindowMixer,
        config: DecoderConfig,
        settings: WindowedSettings,
        rotations: Rotations | None,
    ) -> PackedWindowed:
        """Weights of both parts for the decode kernels."""
        inner = stack_inputs(mixer, mixer.window)
        return PackedWindowed(inner, *pack_parts(mixer, config, settings, rotations))
