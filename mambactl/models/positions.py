"""Rotary positions (RoFormer, arXiv 2104.09864): the angles of a token are those of its place."""

import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from mambactl.json_values import AnyObject
from mambactl.models.mixers.modules import KeepsFloat32

# kinds whose frequencies depend on the length of the text
DYNAMIC, LONGROPE = "dynamic", "longrope"


class RotaryEmbedding(KeepsFloat32, LlamaRotaryEmbedding):
    """Llama's, but a model cast to bf16 keeps its frequencies: a rounded one is off by radians.

    Where frequencies depend on the length, transformers takes that of the whole call, so that a
    key's angle depends on how the text was cut into calls. Here a token has the frequencies of the
    text up to itself, in every call the same.
    """

    float32_names = ("inv_freq", "original_inv_freq", "long_inv_freq")

    inv_freq: Tensor  # [P / 2]
    long_inv_freq: Tensor  # [P / 2], of that kind alone

    def __init__(self, config: LlamaConfig):
        super().__init__(config)
        if self.rope_type == LONGROPE:
            beyond = _parameter(config, "original_max_position_embeddings") + 1
            long, _ = ROPE_INIT_FUNCTIONS[LONGROPE](config, None, seq_len=beyond)
            self.register_buffer("long_inv_freq", long, persistent=False)

    @torch.no_grad()
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [B, T, P] for positions [B, T], in the dtype of x."""
        if self.rope_type not in (DYNAMIC, LONGROPE):
            return super().forward(x, position_ids)
        frequencies = self._dynamic if self.rope_type == DYNAMIC else self._longrope
        with torch.autocast(x.device.type, enabled=False):
            angles = position_ids[..., None].float() * frequencies(position_ids)  # [B, T, P / 2]
            angles = torch.cat((angles, angles), -1)
            cos, sin = (
                (table * self.attention_scaling).to(x.dtype)
                for table in (angles.cos(), angles.sin())
            )
            return cos, sin

    def _longrope(self, positions: Tensor) -> Tensor:
        """Frequencies [B, T, P / 2]: the long ones for tokens beyond the original length."""
        original = _parameter(self.config, "original_max_position_embeddings")
        beyond = (positions >= original)[..., None]
        return torch.where(beyond, self.long_inv_freq.float(), self.inv_freq.float())

    def _dynamic(self, positions: Tensor) -> Tensor:
        """Frequencies [B, T, P / 2] whose base grows with the length beyond what was trained."""
        longest, factor = self.original_max_seq_len, _parameter(self.config, "factor")
        length = (positions + 1).clamp(min=longest).float()
        growth = factor * length / longest - (factor - 1)  # [B, T]
        # base^(-2 i / P) times growth^(-2 i / (P - 2)), i being the index of the pair
        half = len(self.inv_freq)
        power = torch.arange(half, device=positions.device) / max(half - 1, 1)
        return self.inv_freq.float() * growth[..., None] ** -power


def _parameter(config: LlamaConfig, name: str) -> int | float:
    """A number that rotary positions of a kind cannot do without; KeyError without it."""
    return rotary_of(config)[name]


def rotary_of(config: LlamaConfig) -> AnyObject:
    """Parameters of the rotation, empty for a model without."""
    return config.rope_parameters or {}
