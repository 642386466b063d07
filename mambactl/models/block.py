"""One block of the decoder: a mixer and an MLP with their norms, and the norm behind the last."""

from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from mambactl.models.cache import HybridCache
from mambactl.models.config import HybridConfig
from mambactl.models.mixers.attention import AttentionMixer, RMSNorm
from mambactl.models.mixers.spec import Mixer, StepContext
from mambactl.models.mlp import GatedMLP
from mambactl.models.own_device import OwnDevice
from mambactl.present import of_kind


class FinalRMSNorm(RMSNorm):
    """The norm in front of the head, and what divides logits."""

    def __init__(self, width: int, eps: float, factor: float):
        super().__init__(width, eps)
        self.factor = factor

    def forward(self, hidden_states: Tensor) -> Tensor:
        """x [..., D] -> [..., D]."""
        normed = super().forward(hidden_states)
        return normed if self.factor == 1 else normed * self.factor


class HybridBlock(GradientCheckpointingLayer):
    """x + mixer(norm(x)), then x + mlp(norm(x)) where the architecture has an MLP.

    Of a model on several devices, a block has its `own_device`, and the last one hands its output
    `back` to the first device.
    """

    own_device: OwnDevice | None = None
    back: torch.device | None = None

    def __init__(self, config: HybridConfig, index: int):
        super().__init__()
        self.index = index
        layer = config.layer(index)
        self.mixer_name = layer.spec.attribute
        self.is_attention = layer.spec.is_attention
        self.post_norm, self.factor = config.post_norm, config.residual_multiplier
        self.has_mlp = config.has_mlp
        norm = partial(RMSNorm, config.hidden_size, config.rms_norm_eps)
        if not self.post_norm:
            self.input_layernorm = norm()
        module = layer.spec.module(config, layer.settings, config.rotated(index))
        setattr(self, self.mixer_name, module)
        if self.has_mlp or self.post_norm:
            # in front of the MLP, or behind the mixer: the families call both so
            self.post_attention_layernorm = norm()
        if self.has_mlp:
            self.mlp = GatedMLP(config)
            if self.post_norm:
                self.post_feedforward_layernorm = norm()

    @property
    def mixer(self) -> nn.Module:
        """The layer's token mixer."""
        return getattr(self, self.mixer_name)

    @property
    def attention(self) -> AttentionMixer:
        """The token mixer of a layer that is attention alone; TypeError in another."""
        return of_kind(AttentionMixer, self.mixer)

    @property
    def replacing(self) -> Mixer:
        """The token mixer of a layer whose attention was replaced."""
        # modules have the attributes that their classes say, which no type knows of all mixers
        return cast(Mixer, self.mixer)

    def forward(self, hidden: Tensor, context: StepContext, cache: HybridCache | None) -> Tensor:
        """hidden [B, T, D] -> [B, T, D]."""
        return self.run(hidden, context, cache)

    def run(self, hidden: Tensor, context: StepContext, cache: HybridCache | None) -> Tensor:
        """`forward` without what wraps it, hooks and checkpoints: the part that is compiled."""
        return self._step(hidden, context, cache)[0]

    def observe(self, hidden: Tensor, context: StepContext) -> tuple[Tensor, Tensor, Tensor]:
        """The block's output, its mixer's input and its mixer's output, all [B, T, D]."""
        return self._step(hidden, context, None)

    def _step(
        self, hidden: Tensor, context: StepContext, cache: HybridCache | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        if self.own_device is None:
            return self._step_here(hidden, context, cache)
        hidden, entering, mixed = self._step_here(*self.own_device.entered(hidden, context), cache)
        return hidden if self.back is None else hidden.to(self.back), entering, mixed

    def _step_here(
        self, hidden: Tensor, context: StepContext, cache: HybridCache | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        layer_cache = None if cache is None else cache.layers[self.index]
        entering = self.entering(hidden)
        mixed = self.mixer(entering, context, layer_cache)
        if self.post_norm:
            hidden = hidden + self._scaled(self.post_attention_layernorm(mixed))
            if self.has_mlp:
                inner = self.post_feedforward_layernorm(self.mlp(hidden))
                hidden = hidden + self._scaled(inner)
            return hidden, entering, mixed
        hidden = hidden + self._scaled(mixed)
        if self.has_mlp:
            inner = self.mlp(self.post_attention_layernorm(hidden))
            hidden = hidden + self._scaled(inner)
        return hidden, entering, mixed

    def mixer_output(self, entering: Tensor, context: StepContext) -> Tensor:
        """The output [B, T, D] of the mixer alone for whole rows of its input, from any device."""
        # the row may be that of another model, whose blocks lie elsewhere
        own = self.own_device or OwnDevice(next(self.mixer.parameters()).device)
        return self.mixer(*own.entered(entering, context), None)

    def entering(self, hidden: Tensor) -> Tensor:
        """The mixer's input [B, T, D] in the stream `hidden`."""
        return hidden if self.post_norm else self.input_layernorm(hidden)

    def _scaled(self, added: Tensor) -> Tensor:
        return added if self.factor == 1 else added * self.factor

    @property
    def first_norm(self) -> RMSNorm:
        """The norm in front of the mixer, or behind it."""
        return self.post_attention_layernorm if self.post_norm else self.input_layernorm

    def expected_input(self) -> Tensor:
        """The rms [D] that is expected of the channels of the mixer's input.

        Norms behind mixers and MLPs leave a stream that grows: every layer before is taken to have
        added as much as this one does.
        """
        if not self.post_norm:
            return self.input_layernorm.weight
        norms = [self.post_attention_layernorm]
        if self.has_mlp:
            norms.append(self.post_feedforward_layernorm)
        added = torch.stack([norm.weight.float().square() for norm in norms]).sum(0)  # [D]
        return (added * max(self.index, 1)).sqrt() * self.factor
