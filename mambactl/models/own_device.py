"""A device that holds blocks of a model whose other blocks lie elsewhere."""

import torch
from torch import Tensor

from mambactl.models.mixers.spec import StepContext


class OwnDevice:
    """A device on which a block computes, whatever device its inputs come from.

    The blocks of a device share one of these: a context is copied once for all of them.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._last: tuple[StepContext, StepContext] | None = None

    def entered(self, hidden: Tensor, context: StepContext) -> tuple[Tensor, StepContext]:
        """The inputs of a block on this device: hidden [B, T, D] and its context."""
        if self._last is None or self._last[0] is not context:
            self._last = context, context.to(self.device)
        return hidden.to(self.device), self._last[1]
