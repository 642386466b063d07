"""Grouped-query attention with rotary positions, as in Llama and Mistral."""

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from mambactl.models.cache import AttentionCache
from mambactl.models.config import HybridConfig
from mambactl.models.mixers.context import StepContext


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
        heads = (*hidden.shape[:2], -1, self.head_dim)
        q = self.q_proj(hidden).view(heads).transpose(1, 2)  # [B, H, T, P]
        k = self.k_proj(hidden).view(heads).transpose(1, 2)  # [B, Hk, T, P]
        v = self.v_proj(hidden).view(heads).transpose(1, 2)  # [B, Hk, T, P]
        q, k = apply_rotary_pos_emb(q, k, *context.rotary)
        if cache is not None:
            k, v = cache.update(k, v, context.positions, context.slots)  # [B, Hk, S, P]
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=context.mask, is_causal=context.mask is None, enable_gqa=True
        )
        return self.o_proj(y.transpose(1, 2).reshape(*hidden.shape[:2], -1))
