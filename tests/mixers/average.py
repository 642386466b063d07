"""A decaying average as a mixer: everything about it is in this file."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import LlamaConfig

from mambactl.kernels import reference as kernels
from mambactl.models.cache import RecurrentCache
from mambactl.models.mixers.spec import (
    AttentionWeights,
    MixerCost,
    MixerForm,
    MixerSpec,
    StepContext,
)


@dataclass(frozen=True)
class AverageSettings:
    """Channels that are averaged, and the tokens after which a value counts half."""

    width: int
    half_life: float = 4.0


class AverageMixer(nn.Module):
    """out_proj(S), S_t = a S_{t-1} + (1 - a) in_proj(u_t), with one decay a per channel."""

    def __init__(self, config: LlamaConfig, settings: AverageSettings):
        super().__init__()
        self.width = settings.width
        self.in_proj = nn.Linear(config.hidden_size, settings.width, bias=False)
        start = torch.full((settings.width,), 0.5 ** (1 / settings.half_life)).logit()
        self.decay = nn.Parameter(start)
        self.out_proj = nn.Linear(settings.width, config.hidden_size, bias=False)

    def forward(self, hidden: Tensor, context: StepContext, cache: RecurrentCache | None) -> Tensor:
        return self.out_proj(self.features(hidden, context, cache).to(hidden.dtype))

    def features(
        self, hidden: Tensor, context: StepContext, cache: RecurrentCache | None = None
    ) -> Tensor:
        kind = kernels.state_dtype(hidden)
        values = self.in_proj(hidden).to(kind)  # [B, T, width]
        if cache is None or cache.state is None:
            start = values.new_zeros(values.shape[0], self.width)
            if cache is None:
                return kernels.recur(self._step, start, (values,), values, seq_idx=context.seq_idx)[
                    0
                ]
            cache.start(start)
        if context.sequential:
            return cache.step_through(self._step, context.cursor, None, (values,), values)
        state = cache.live_state(self._step, context.cursor)
        values = values if context.n_new is None else values.nan_to_num()
        y, state = kernels.recur(self._step, state, (values,), values, context.n_new)
        cache.replace(None, state)
        return y

    def _step(
        self, state: Tensor, value: Tensor, query: Tensor | None
    ) -> tuple[Tensor | None, Tensor]:
        a = self.decay.to(state.dtype).sigmoid()
        state = a * state + (1 - a) * value
        return (None if query is None else state), state


class AverageSpec(MixerSpec[AverageSettings, AverageMixer]):
    """The decaying average; layer i is 8 channels wider than the one before."""

    name = "average"
    title = "decaying average"
    label = "averages"
    attribute = "average"
    module_type = AverageMixer
    sections = {"average": AverageSettings}
    fits_heads = False

    def cache(self, settings: AverageSettings) -> RecurrentCache:
        return RecurrentCache()

    def from_attention(self, config: LlamaConfig, form: MixerForm, index: int) -> AverageSettings:
        return AverageSettings(width=16 + 8 * index)

    def initialise(
        self,
        mixer: AverageMixer,
        attention: AttentionWeights,
        method: str,
        generator: torch.Generator,
    ) -> None:
        rows = torch.arange(mixer.width) % len(attention.v)
        mixer.in_proj.weight.copy_(attention.v[rows])
        columns = torch.arange(mixer.width) % attention.o.shape[1]
        mixer.out_proj.weight.copy_(attention.o[:, columns])
        mixer.decay.copy_(torch.full_like(mixer.decay, 0.5**0.25).logit())

    def cost(self, config: LlamaConfig, settings: AverageSettings, length: int) -> MixerCost:
        width = config.hidden_size * settings.width
        return MixerCost(2 * width, 2 * width, 3 * settings.width)

    def state_elements(self, settings: AverageSettings) -> int:
        return settings.width
