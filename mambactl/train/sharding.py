"""Models whose weights are split over the processes of a run (FSDP2), and work on whole weights.

A block is gathered for its own pass and freed behind it; embedding, last norm and head are gathered
once for a pass and stay until its gradients are there, so a loss in chunks finds the head whole.
"""

import functools
from collections.abc import Callable, Collection, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from mambactl.models.hybrid import HybridForCausalLM
from mambactl.ranks import processes, sharded
from mambactl.train.sharing import Casts

Module = TypeVar("Module", bound=nn.Module)
Result = TypeVar("Result")


def add_inner_loss(model: nn.Module) -> None:
    """Let `model(inner_loss=function)` be `function(model)`, computed inside of its forward.

    Only there DDP and FSDP see what is computed, and only there FSDP has the head's whole weight.
    """
    plain = model.forward

    @functools.wraps(plain)
    def forward(
        *args: object, inner_loss: Callable[[nn.Module], object] | None = None, **kwargs: object
    ) -> object:
        return plain(*args, **kwargs) if inner_loss is None else inner_loss(model)

    model.forward = forward


def inside(module: Module, work: Callable[[Module], Result]) -> Result:
    """Return `work(module)`, done where a module that is split has its own weights whole."""
    return module(inner_loss=work) if isinstance(module, FSDPModule) else work(module)


def regather(module: nn.Module) -> None:
    """Free what a pass without gradients left whole: what is registered is the parts again."""
    for each in module.modules():
        if isinstance(each, FSDPModule):
            each.reshard()


def shard_frozen(model: nn.Module) -> None:
    """Shard a teacher or reference block by block where students are sharded."""
    blocks = getattr(getattr(model, "model", None), "layers", None)
    if not sharded() or blocks is None:
        return
    for block in blocks:
        fully_shard(block)
    fully_shard(model)


def split(
    model: HybridForCausalLM,
    device: torch.device,
    cast: Callable[[str, Tensor], Tensor] | None = None,
    whole: Sequence[nn.Module] = (),
) -> None:
    """Split a model over all processes, block by block, so that no device ever holds all of it.

    Each parameter takes the type that `cast(name, value)` gives it; those that train must be of one
    type, and be marked as such. Modules in `whole` stay as they are on every process. Call `settle`
    before the first pass.
    """
    kept = {parameter for module in whole for parameter in module.to(device).parameters()}
    names = {parameter: name for name, parameter in model.named_parameters()}
    mesh = init_device_mesh(device.type, (processes(),))
    for unit in (*model.model.layers, model):
        for parameter in unit.parameters():
            if cast is not None and parameter not in kept and not isinstance(parameter, DTensor):
                parameter.data = cast(names[parameter], parameter.data)
        fully_shard(unit, mesh=mesh, ignored_params=kept)
        add_inner_loss(unit)


def split_pair(
    student: HybridForCausalLM,
    teacher: HybridForCausalLM | None,
    trained: Collection[str],
    dtype: torch.dtype,
    device: torch.device,
    waiting: Collection[int] = (),
) -> list[str]:
    """Split a student in the types of `sharing.Casts`, and its teacher; names of what was rounded.

    Attention of the teacher in `waiting` layers, which also runs in the student's blocks, stays
    whole on every process.
    """
    casts = Casts(trained, dtype)
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(name in trained)
    split(student, device, casts)
    settle(student)
    if teacher is not None:
        split(teacher, device, whole=[teacher.model.layers[index].mixer for index in waiting])
        settle(teacher)
    return casts.rounded


@torch.no_grad()
def settle(model: HybridForCausalLM) -> None:
    """Let a split model be the outermost of its blocks, which later run on their own, too."""
    inside(model, lambda whole: None)
    regather(model)
