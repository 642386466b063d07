"""RMSNorm (arXiv 1910.07467) of hidden states and of heads."""

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm

HALVES = (torch.bfloat16, torch.float16)


class RMSNorm(LlamaRMSNorm):
    """x / sqrt(mean(x^2) + eps) times a weight, rounded where Llama's is."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """x [..., D] -> [..., D]."""
        width, eps, kind = self.weight.shape, self.variance_epsilon, hidden_states.dtype
        if self.weight.dtype == kind and kind not in HALVES:
            return F.rms_norm(hidden_states, width, self.weight, eps)
        # a half is rounded before the weight multiplies it
        return self.weight * F.rms_norm(hidden_states.float(), width, None, eps).to(kind)
