"""Products of few rows with weights that a CPU streams from memory, in bfloat16 where that pays."""

import torch
import torch.nn.functional as F
from torch import Tensor


def computes_bfloat16() -> bool:
    """True if this CPU has bfloat16 vector products; without them fp32 is faster."""
    mkldnn = torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled
    return mkldnn and torch.cpu._is_avx512_bf16_supported()


class Products:
    """x W^T in fp32 for weights of any model, in fp32 or from copies of them in bfloat16.

    A copy is made when its weight is first used, in the order in which oneDNN reads it fastest; x
    is rounded to bfloat16 and so is the result, sums are fp32. The copies are of the weights as
    they were then.
    """

    def __init__(self, bfloat16: bool):
        self.bfloat16 = bfloat16
        # weights are kept beside their copies: their addresses are the keys
        self._packed: dict[tuple[int, ...], tuple[tuple[Tensor, ...], Tensor]] = {}

    def __call__(self, x: Tensor, *weights: Tensor) -> Tensor:
        """x [M, K] times the weights [N, K_i] side by side (K is the sum of all K_i): [M, N]."""
        if not self.bfloat16:
            parts = x.float().split([w.shape[1] for w in weights], 1)
            y = F.linear(parts[0], weights[0].float())
            for part, w in zip(parts[1:], weights[1:], strict=True):
                y += F.linear(part, w.float())
            return y
        y = torch.ops.mkldnn._linear_pointwise(
            x.bfloat16(), self._copy(weights), None, "none", [], ""
        )
        return y.float()

    def _copy(self, weights: tuple[Tensor, ...]) -> Tensor:
        key = (len(weights[0]), *(w.data_ptr() for w in weights))
        found = self._packed.get(key)
        if found is None:
            whole = torch.cat([w.bfloat16() for w in weights], 1)
            found = self._packed[key] = (weights, torch.ops.mkldnn._reorder_linear_weight(whole))
        return found[1]
