"""The steps of a conversion on a mixer alone: its spec is found by its class."""

import torch

from mambactl.conversion.fit import LayerFit, Problem, fit_heads, fit_mixer
from mambactl.models.mixers.registry import spec_of
from mambactl.models.mixers.spec import AttentionWeights, HeadFit


@torch.no_grad()
def initialise(mixer, attention: AttentionWeights, method: str, generator) -> None:
    spec_of(mixer).initialise(mixer, attention, method, generator)


@torch.no_grad()
def apply_fit(mixer, attention: AttentionWeights, fit: HeadFit) -> None:
    spec_of(mixer).apply_fit(mixer, attention, fit)


def fitted(mixer, attention: AttentionWeights, problem: Problem) -> LayerFit:
    return fit_mixer(spec_of(mixer), mixer, attention, problem)


def heads_of(mixer, attention: AttentionWeights, problem: Problem) -> HeadFit:
    return fit_heads(spec_of(mixer), mixer, attention, problem)
