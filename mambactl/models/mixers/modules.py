"""Modules that mixers share, and when the weights of one may be read without calling it.

Offloading, sharding, calibration and adapters act when a module is called. So a mixer calls its
modules, but for products of several weights at once, which are for modules that nothing acts on.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambactl.kernels import dispatch
from mambactl.kernels import reference as kernels
from mambactl.models.mixers.sizes import FLOAT32_PARAMETERS


class KeepsFloat32(nn.Module):
    """A module whose `float32_names` survive `.to(bfloat16)` and `.half()` as fp32."""

    float32_names = FLOAT32_PARAMETERS

    def initial_values(self) -> dict[str, Tensor]:
        """Initial values of the module's own parameters; submodules have rules of their own."""
        return {}

    def _apply(self, fn: Callable, recurse: bool = True) -> nn.Module:
        kept = {name: getattr(self, name, None) for name in self.float32_names}
        before = {name: t.data for name, t in kept.items() if t is not None}
        super()._apply(fn, recurse)
        for name, data in before.items():
            tensor = getattr(self, name)
            if tensor.dtype in (torch.bfloat16, torch.float16):
                tensor.data = data.to(tensor.device, torch.float32)
        return self


class CausalConv(nn.Conv1d):
    """Depthwise causal convolution over time, and SiLU."""

    def __init__(self, channels: int, width: int, bias: bool):
        super().__init__(channels, channels, width, groups=channels, bias=bias)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        x: Tensor,
        previous: Tensor | None = None,
        seq_idx: Tensor | None = None,
        sequential: bool = False,
    ) -> Tensor:
        """x [B, T, Ch] behind `previous` [B, W-1, Ch] -> [B, T, Ch].

        `sequential` is for tokens that a rollback may take back.
        """
        taps = x, self.weight[:, 0], self.bias, previous, seq_idx
        # token by token must round like the replay after a rollback, so it stays on the reference
        if sequential:
            return F.silu(kernels.causal_conv1d(*taps))
        return dispatch.causal_conv1d_silu(*taps)


def is_its_weight(module: nn.Module) -> bool:
    """True if a call of a linear map is a product with its weight and nothing else.

    False for adapters, hooks, and weights that are sharded, quantised or elsewhere.
    """
    return (
        type(module) is nn.Linear
        # where accelerate puts its hooks
        and "forward" not in module.__dict__
        and type(module.weight) in (nn.Parameter, Tensor)
        and not (
            module._forward_hooks
            or module._forward_pre_hooks
            or module._backward_hooks
            or module._backward_pre_hooks
        )
    )
