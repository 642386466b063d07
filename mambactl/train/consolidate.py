"""A model whose weights are split over processes, as one model again."""

import torch
from torch.distributed.tensor import DTensor

from mambactl.models.hybrid import HybridForCausalLM
from mambactl.ranks import is_main


def consolidated(model: HybridForCausalLM) -> HybridForCausalLM | None:
    """The whole model on the main process, None on the others; every process must call it."""
    state = model.state_dict()
    if not any(isinstance(tensor, DTensor) for tensor in state.values()):
        return model if is_main() else None
    whole = {}
    for name, tensor in state.items():
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if is_main():
            whole[name] = full.cpu()
    if not is_main():
        return None
    with torch.device("meta"):
        plain = HybridForCausalLM(model.config)
    plain.load_state_dict(whole, assign=True)
    plain.tie_weights()
    return plain
