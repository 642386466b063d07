"""Weights and states that are split over processes, as one again, and the part of each process."""

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from mambactl.json_values import JsonObject
from mambactl.models.hybrid import HybridForCausalLM
from mambactl.ranks import is_main


def consolidated(model: HybridForCausalLM) -> HybridForCausalLM | None:
    """The whole model on the main process, None on the others; every process must call it."""
    state = model.state_dict()
    if not any(isinstance(tensor, DTensor) for tensor in state.values()):
        return model if is_main() else None
    full = {name: _on_main(tensor) for name, tensor in state.items()}
    if not is_main():
        return None
    with torch.device("meta"):
        plain = HybridForCausalLM(model.config)
    plain.load_state_dict(full, assign=True)
    plain.tie_weights()
    return plain


def gathered(state: JsonObject) -> JsonObject:
    """The state with every tensor that is split whole in the main process, and empty in others.

    Tensors lie in lists and dictionaries. Every process must call it with a state of one form.
    """
    return {key: _gathered(value) for key, value in state.items()}


def _gathered(value: object) -> object:
    if isinstance(value, dict):
        return {key: _gathered(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_gathered(each) for each in value]
    return _on_main(value) if isinstance(value, DTensor) else value


def _on_main(value: Tensor) -> Tensor:
    """A tensor that may be split, whole in the memory of the main process and empty in others."""
    full = whole(value.detach())
    return full.cpu() if is_main() else full.new_empty(0, device="cpu")


def whole(value: Tensor) -> Tensor:
    """A tensor that may be split, whole on every process."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def part(value: Tensor, like: Tensor) -> Tensor:
    """This process's part of a whole tensor, split as `like` of the same shape is."""
    if not isinstance(like, DTensor) or value.shape != like.shape:
        return value
    return distribute_tensor(
        value.to(like.device), like.device_mesh, like.placements, src_data_rank=None
    )


def scatter_moments(optimizer: torch.optim.Optimizer, state: JsonObject) -> JsonObject:
    """The state of an optimizer, of `gathered`, for parameters that may be split."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    moments = {
        number: {name: part(value, parameters[number]) for name, value in found.items()}
        for number, found in state["state"].items()
    }
    return {**state, "state": moments}
