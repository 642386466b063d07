"""Parameters that stay fp32 whatever the model is cast to: rounding A_log loses its updates."""

from collections.abc import Callable

import torch
from torch import nn

FLOAT32_PARAMETERS = ("A_log", "D", "dt_bias")


class KeepsFloat32(nn.Module):
    """A module whose `float32_names` survive `.to(bfloat16)` and `.half()` as fp32."""

    float32_names = FLOAT32_PARAMETERS

    def _apply(self, fn: Callable, recurse: bool = True) -> nn.Module:
        kept = {name: getattr(self, name, None) for name in self.float32_names}
        before = {name: t.data for name, t in kept.items() if t is not None}
        super()._apply(fn, recurse)
        for name, data in before.items():
            tensor = getattr(self, name)
            if tensor.dtype in (torch.bfloat16, torch.float16):
                tensor.data = data.to(tensor.device, torch.float32)
        return self
