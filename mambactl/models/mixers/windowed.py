"""Mamba-2 beside the attention it replaces, of which a window and sinks remain.

    out = mamba2(u) + attention(u; the last W tokens and the first S of the document)
The window is made of the teacher's projections, so the layer may start as the teacher under that
window, and its state learns what lies beyond.
"""

from torch import Tensor

from mambactl.kernels.dispatch import attention
from mambactl.kernels.local_attention import LocalKeys, attend_locally, local_keys
from mambactl.models.cache import WindowedCache
from mambactl.models.config import HybridConfig
from mambactl.models.mixers.attention import AttentionMixer
from mambactl.models.mixers.context import StepContext
from mambactl.models.mixers.mamba2 import Mamba2Mixer


class WindowAttention(AttentionMixer):
    """Attention with sinks whose cache is a ring."""

    def __init__(self, config: HybridConfig):
        super().__init__(config)
        sizes = config.mamba2_window_settings
        shared = config.num_attention_heads // config.num_key_value_heads
        self.span = (sizes.window, sizes.sinks, shared)

    def forward(self, hidden: Tensor, context: StepContext, cache: WindowedCache | None) -> Tensor:
        """hidden [B, T, D] -> [B, T, D]."""
        return self.o_proj(self.features(hidden, context, cache))

    def features(
        self, hidden: Tensor, context: StepContext, cache: WindowedCache | None = None
    ) -> Tensor:
        """The input of o_proj [B, T, H P]."""
        q, k, v = self._heads(hidden, context, whole=cache is None)
        if cache is None:
            return attend_locally(q, k, v, self._keys(context)).flatten(2)
        start, cursor = context.positions[:, 0], context.cursor
        if context.first and not context.sequential:
            y = attend_locally(q, k, v, self._keys(context))
        else:
            y = attention(q, *cache.seen(k, v, start))  # [B, T, H, P]
        revocable = 0
        if cursor.recording and context.sequential:
            revocable = k.shape[2] + (0 if cursor.settle else int(cursor.held.max()))
        cache.write(k, v, start, context.n_new, revocable)
        return y.flatten(2)

    def _keys(self, context: StepContext) -> LocalKeys:
        """What the context has for all layers; one of another model, a teacher's, may lack it."""
        if context.local is not None and context.local.span == self.span:
            return context.local
        positions = context.positions
        return local_keys(*positions.shape, *self.span, context.seq_idx, positions.device)


class Mamba2WindowMixer(Mamba2Mixer):
    """A Mamba-2 mixer plus `window`, attention to what is near."""

    def __init__(self, config: HybridConfig):
        super().__init__(config)
        self.window = WindowAttention(config)

    def forward(self, hidden: Tensor, context: StepContext, cache: WindowedCache | None) -> Tensor:
        """hidden [B, T, D] -> [B, T, D]."""
        return super().forward(hidden, context, cache) + self.window(hidden, context, cache)
