"""Parameters that stay fp32 whatever the model is cast to: rounding A_log loses its updates."""

from collections.abc import Callable

import torch
from torch import nn

FLOAT32_PARAMETERS = ("A_log", "D", "dt_bias")


class KeepsFloat32(nn.Module):
    """A module whose `A_log`, `D` and `dt_bias` survive `.to(bfloat16)` and `.half()` as fp32."""

    def _apply(self, fn: Callable, recurse: bool = True) -> nn.Module:
        kept = {name: getattr(self, name, None) for name in FLOAT32_PARAMETERS}
        before = {name: p.data for name, p in kept.items() if p is not None}
        super()._apply(fn, recurse)
        for name, data in before.items():
            parameter = getattr(self, name)
            if parameter.dtype in (torch.bfloat16, torch.float16):
                parameter.data = data.to(parameter.device, torch.float32)
        return self
