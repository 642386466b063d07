"""The gated MLP of a Llama block."""

from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from mambactl.kernels import dispatch

# names of one function in a configuration
SILU = ("silu", "swish")


class GatedMLP(LlamaMLP):
    """down(act(gate(x)) up(x)); SiLU and its product are one kernel where there is one."""

    def __init__(self, config: LlamaConfig):
        super().__init__(config)
        self.is_silu = config.hidden_act in SILU

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., D]."""
        if not self.is_silu:
            return super().forward(x)
        return self.down_proj(dispatch.swiglu(self.gate_proj(x), self.up_proj(x)))
