"""What the processes of one run tell each other; alone, every one of these changes nothing."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from mambactl.models.hybrid import HybridForCausalLM
from mambactl.ranks import is_main, processes


def join(device: torch.device) -> None:
    """Meet the other processes, for work on a device and numbers on the host."""
    if processes() > 1 and not torch.distributed.is_initialized():
        cuda = device.type == "cuda"
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        torch.distributed.init_process_group(backend, device_id=device if cuda else None)


def add_up(tensors: Sequence[Tensor]) -> None:
    """Replace tensors by their sums over all processes, all of them at once."""
    if processes() == 1:
        return
    for work in [torch.distributed.all_reduce(tensor, async_op=True) for tensor in tensors]:
        work.wait()


def total(value: Tensor) -> Tensor:
    """The sum of a tensor over all processes."""
    found = value.detach().clone()
    add_up([found])
    return found


def largest(value: int, device: torch.device | str = "cpu") -> int:
    """The largest of every process's numbers."""
    if processes() == 1:
        return value
    shared = torch.tensor(value, device=device)
    torch.distributed.all_reduce(shared, torch.distributed.ReduceOp.MAX)
    return int(shared)


def from_main(value: Any) -> Any:
    """What the main process has, on every process."""
    if processes() == 1:
        return value
    shared = [value]
    torch.distributed.broadcast_object_list(shared)
    return shared[0]


def leave() -> None:
    """End the company of the other processes, once all work is done."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


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
