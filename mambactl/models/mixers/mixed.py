"""A layer in which some KV heads keep full attention and the others become Mamba-2 with a window.

    out = attention(u; kept heads) + window(u; other heads) + mamba2(u; other heads)
A KV head goes with the query heads that share it. Kept heads are the teacher's, and the recurrence
has heads for the others alone. Each group has its own projections: their rows (of q, k, v and
in_proj) and columns (of o_proj and out_proj) may lie next to each other in memory, as one product
each.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mambactl.models.cache import MixedCache
from mambactl.models.mixers.attention import (
    AttentionMixer,
    attention_cost,
    copy_attention,
    kept_cost,
    pack_attention,
)
from mambactl.models.mixers.mamba2 import Mamba2Mixer, mamba2_from_attention
from mambactl.models.mixers.mixed_decode import PackedMixed
from mambactl.models.mixers.settings import (
    KeptHeads,
    Mamba2Settings,
    MixedSettings,
    WindowedSettings,
)
from mambactl.models.mixers.sizes import MixedSizes
from mambactl.models.mixers.spec import (
    AnySpec,
    AttentionWeights,
    Basis,
    DecoderConfig,
    HeadFit,
    MixerCost,
    MixerForm,
    StepContext,
)
from mambactl.models.mixers.windowed import (
    RECURRENCE,
    BesideSpec,
    Mamba2WindowMixer,
    keys_in,
    pack_parts,
    stack_inputs,
    windowed_sizes,
)
from mambactl.models.packed import Rotations


def others(kept: Sequence[int], kv_heads: int) -> tuple[int, ...]:
    """Indices of the KV heads, of `kv_heads` in all, that are not kept."""
    return tuple(head for head in range(kv_heads) if head not in kept)


class MixedMixer(Mamba2WindowMixer):
    """Mamba-2 and a window in place of some KV heads, plus full `attention` of the others."""

    def __init__(self, config: DecoderConfig, settings: MixedSettings, rotated: bool = True):
        kept = settings.kept_heads.heads
        replaced = others(kept, config.num_key_value_heads)
        super().__init__(config, settings, len(replaced), rotated)
        self.kept, self.replaced = kept, replaced
        # the bias of o_proj is the window's
        self.attention = AttentionMixer(config, len(kept), output_bias=False, rotated=rotated)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, hidden: Tensor, context: StepContext, cache: MixedCache | None
    ) -> Tensor:
        """hidden [B, T, D] -> [B, T, D]."""
        context = self._joined(hidden, context)
        kept = self.attention(hidden, context, None if cache is None else cache.kept)
        return super().forward(hidden, context, cache) + kept

    def recurrent(self, hidden: Tensor, context: StepContext) -> Tensor:
        """Output [B, T, D] of Mamba-2 alone, for whole rows."""
        return Mamba2Mixer.forward(self, hidden, context, None)

    def given(self, hidden: Tensor, context: StepContext) -> Tensor:
        """Output [B, T, D] of the attention in both parts."""
        return super().given(hidden, context) + self.attention(hidden, context, None)

    def attended(self, hidden: Tensor, context: StepContext) -> Tensor:
        """Heads [B, T, H P] of the attention in both parts, in the teacher's order."""
        context = self._joined(hidden, context)
        near = self.window.features(hidden, context).unflatten(-1, (len(self.replaced), -1))
        kept = self.attention.features(hidden, context).unflatten(-1, (len(self.kept), -1))
        order = torch.tensor([*self.replaced, *self.kept], device=hidden.device).argsort()
        return torch.cat([near, kept], -2).index_select(-2, order).flatten(-2)

    def _joined(self, hidden: Tensor, context: StepContext) -> StepContext:
        """The context with the squares of all heads, where one norm is of all."""
        if not self.attention.joint_norm:
            return context
        parts = self.attention, self.window
        kept, near = (part.head_squares(hidden) for part in parts)  # [2, B, T, 1]
        squares = kept + near
        widths = [sum(len(getattr(part, f"{n}_norm").weight) for part in parts) for n in "qk"]
        means = squares / squares.new_tensor(widths).view(2, 1, 1, 1)
        return replace(context, head_squares=means)

    def own(self, attention: AttentionWeights) -> AttentionWeights:
        """The part of the teacher's attention that the recurrence replaces."""
        return attention.of_heads(self.replaced, len(self.replaced) + len(self.kept))


# tensors without a part for each head
WHOLE = {"out_proj.bias", "window.o_proj.bias"}
NORMS = {"window.q_norm.weight", "window.k_norm.weight"}
# tensors whose columns belong to heads
BY_COLUMN = {"out_proj.weight", "window.o_proj.weight"}


@dataclass(frozen=True)
class _HeadCut:
    """Cuts tensors of a mixer with a recurrence of `count` KV heads down to those of `index`."""

    sizes: Mamba2Settings
    count: int
    index: list[int]
    joint_norm: bool

    def __call__(self, name: str, tensor: Tensor) -> Tensor:
        """The part of one tensor of the mixer, by its name in it."""
        if name in WHOLE or (name in NORMS and not self.joint_norm):
            return tensor
        if name in BY_COLUMN:
            return self._cut(tensor, 1)
        sections = self.sizes.in_rows
        if name.startswith("in_proj."):
            return torch.cat([self._cut(part) for part in tensor.split(sections)])
        if name.startswith("conv1d."):
            return torch.cat([self._cut(part) for part in tensor.split(sections[1:4])])
        return self._cut(tensor)

    def _cut(self, tensor: Tensor, dim: int = 0) -> Tensor:
        parts = tensor.unflatten(dim, (self.count, -1))
        index = torch.tensor(self.index, dtype=torch.long)
        return parts.index_select(dim, index).flatten(dim, dim + 1)


class MixedSpec(MixedSizes, BesideSpec[MixedSettings, MixedMixer]):
    """Full attention of some KV heads, Mamba-2 beside a window in place of the others."""

    title = "mixture of KV heads with full attention and Mamba-2 heads plus attention"
    module_type = MixedMixer
    inherited = {"window": "windows of mamba mixers", "attention": "kept heads of mamba mixers"}
    keeps = "attention"
    branches = {"recurrent": "out_proj", "window": "window", "attention": "attention"}

    def cache(self, settings: MixedSettings) -> MixedCache:
        """An empty cache of one layer."""
        return MixedCache(settings.mamba2_window)

    def from_attention(self, config: DecoderConfig, form: MixerForm, index: int) -> MixedSettings:
        """Sizes in the place of the attention of layer `index`, which keeps the form's heads."""
        whole = windowed_sizes(config, form, index)
        count = len(others(form.kept, config.num_key_value_heads))
        sizes = mamba2_from_attention(config, form.biased(config), form.rotary, count)
        return MixedSettings(sizes, whole.mamba2_window, KeptHeads(form.kept))

    def initialise(
        self,
        mixer: MixedMixer,
        attention: AttentionWeights,
        method: str,
        generator: torch.Generator,
    ) -> None:
        """Fill a mixer in place; calibrated, its recurrence starts silent beside the rest."""
        super().initialise(mixer, mixer.own(attention), method, generator)
        count = len(mixer.replaced) + len(mixer.kept)
        copy_attention(mixer.attention, attention.of_heads(mixer.kept, count))

    def basis(
        self, mixer: MixedMixer, attention: AttentionWeights, hidden: Tensor, context: StepContext
    ) -> Basis:
        """The parts that each replaced head mixes."""
        return RECURRENCE.basis(mixer, mixer.own(attention), hidden, context)

    def apply_fit(self, mixer: MixedMixer, attention: AttentionWeights, fit: HeadFit) -> None:
        """Write a fit of every replaced head into the recurrence."""
        RECURRENCE.apply_fit(mixer, mixer.own(attention), fit)

    def beside(self, mixer: MixedMixer, hidden: Tensor, context: StepContext) -> Tensor:
        """Heads [B, T, H P] of kept heads and of the window."""
        return mixer.attended(hidden, context)

    def recurrent_heads(self, mixer: MixedMixer, heads: Tensor) -> Tensor:
        """Heads that the recurrence replaces, out of the attention's heads [B, T, H P]."""
        count = len(mixer.replaced) + len(mixer.kept)
        index = torch.tensor(mixer.replaced, device=heads.device)
        return heads.unflatten(-1, (count, -1)).index_select(-2, index).flatten(-2)

    def start_fit(self, mixer: MixedMixer, attention: AttentionWeights) -> None:
        """Give the silent output projection the weights of the replaced heads to refit."""
        super().start_fit(mixer, mixer.own(attention))

    def narrowed(
        self, config: DecoderConfig, settings: WindowedSettings, kept: tuple[int, ...]
    ) -> MixedSettings:
        """Settings in place of a mixer with windows that stands for as many heads or more."""
        count = len(others(kept, config.num_key_value_heads))
        heads = mamba2_from_attention(config, False, kv_heads=count)
        sizes = settings.mamba2.with_heads_of(heads)
        return MixedSettings(sizes, settings.mamba2_window, KeptHeads(kept))

    def taken(
        self,
        tensors: Mapping[str, Tensor],
        theirs: tuple[AnySpec, WindowedSettings],
        ours: MixedSettings,
        config: DecoderConfig,
        attention: AttentionWeights,
    ) -> dict[str, Tensor]:
        """Take the heads that are replaced here from another mixer; kept ones are attention's."""
        spec, settings = theirs
        count = config.num_key_value_heads
        present = others(spec.kept_heads(config, settings), count)
        wanted = others(ours.kept_heads.heads, count)
        index = [present.index(head) for head in wanted]
        cut = _HeadCut(settings.mamba2, len(present), index, config.qk_norm == "all")
        found = {
            name: cut(name, tensor)
            for name, tensor in tensors.items()
            if not name.startswith("attention.")
        }
        with torch.device("meta"):
            kept = AttentionMixer(config, len(ours.kept_heads.heads), output_bias=False)
        kept.to_empty(device="cpu")
        with torch.no_grad():
            copy_attention(kept, attention.of_heads(ours.kept_heads.heads, count))
        kept.to(attention.q.dtype)
        return found | {f"attention.{name}": t for name, t in kept.state_dict().items()}

    def cost(self, config: DecoderConfig, settings: MixedSettings, length: int) -> MixerCost:
        """Operations per token of all parts."""
        span, kept = settings.mamba2_window, len(settings.kept_heads.heads)
        near = attention_cost(
            config, min(length / 2, span.window + span.sinks), config.num_key_value_heads - kept
        )
        seen = min(length / 2, config.sliding_window or length)
        whole = kept_cost(config, seen, kept)
        return RECURRENCE.cost(config, settings.mamba2, length).plus(near).plus(whole)

    def kv_read(self, config: DecoderConfig, settings: MixedSettings, context: int) -> int:
        """Numbers of keys and values that a step behind `context` tokens reads."""
        kept = len(settings.kept_heads.heads)
        near = (config.num_key_value_heads - kept) * keys_in(settings.mamba2_window, context)
        far = kept * min(context, config.sliding_window or context)
        return 2 * config.head_dim * (near + far)

    def pack(
        self,
        mixer: MixedMixer,
        config: DecoderConfig,
        settings: MixedSettings,
        rotations: Rotations | None,
    ) -> PackedMixed:
        """Weights of all parts for the decode kernels."""
        inner = stack_inputs(mixer, mixer.attention, mixer.window)
        parts = pack_parts(mixer, config, settings, rotations)
        kept = pack_attention(mixer.attention, config, config.sliding_window or 0)
        return PackedMixed(inner, *parts, kept)
