"""Grouped-query attention with rotary positions, as in Llama and Mistral."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambactl.kernels import dispatch
from mambactl.models.cache import AttentionCache
from mambactl.models.config import HybridConfig
from mambactl.models.mixers.context import StepContext
from mambactl.models.mixers.rotary import rotated


class AttentionMixer(nn.Module):
    """softmax(q k^T / sqrt(P)) v over the keys the context's mask allows."""

    def __init__(self, config: HybridConfig):
        super().__init__()
        self.head_dim = config.head_dim
        width, bias = config.hidden_size, config.attention_bias
        inner = config.num_attention_heads * config.head_dim
        shared = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(width, inner, bias=bias)
        self.k_proj = nn.Linear(width, shared, bias=bias)
        self.v_proj = nn.Linear(width, shared, bias=bias)
        self.o_proj = nn.Linear(inner, width, bias=bias)

    def forward(self, hidden: Tensor, context: StepContext, cache: AttentionCache | None) -> Tensor:
        """hidden [B, T, D] -> [B, T, D]."""
        q, k, v = self._heads(hidden, context, whole=cache is None)
        if cache is not None:
            k, v = cache.update(k, v, context.positions, context.slots)  # [B, Hk, S, P]
        y = dispatch.attention(q, k, v, context.mask, context.spans)  # [B, T, H, P]
        return self.o_proj(y.flatten(2))

    def _heads(self, hidden: Tensor, context: StepContext, whole: bool) -> tuple[Tensor, ...]:
        """Queries and keys, rotated, and values [B, H or Hk, T, P]."""
        *turning, v = (
            t.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for t in self._project(hidden, whole)
        )
        cos, sin = (t.unsqueeze(1) for t in context.rotary)  # [B, 1, T, P]
        # under autocast the rotation is fp32
        turned = [rotated(t, cos, sin).to(v.dtype) for t in turning]
        if len(turned) == 1:
            heads = v.shape[1]
            turned = turned[0].split([turned[0].shape[1] - heads, heads], 1)
        return *turned, v

    def _project(self, hidden: Tensor, whole: bool) -> tuple[Tensor, ...]:
        """Queries, keys and values; with `whole` queries and keys next to each other.

        All are one product then, which a whole row fills better.
        """
        parts = self.q_proj, self.k_proj, self.v_proj
        # an adapter around a projection acts when it is called, not in its weight
        if not whole or any(type(part) is not nn.Linear for part in parts):
            return tuple(part(hidden) for part in parts)
        weight = torch.cat([part.weight for part in parts])
        bias = None if self.q_proj.bias is None else torch.cat([part.bias for part in parts])
        rows = [self.q_proj.out_features + self.k_proj.out_features, self.v_proj.out_features]
        return F.linear(hidden, weight, bias).split(rows, -1)
