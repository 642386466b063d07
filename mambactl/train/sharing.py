"""Share frozen weights with the teacher and hold them in the type that products take.

A student that was converted from its teacher has the teacher's own tensors in most places. Frozen,
they need neither a second copy nor fp32: they share the teacher's memory, and what the teacher has
not is cast. fp32 masters remain for what trains.
"""

from collections.abc import Callable, Collection
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mambactl.checkpoint.load import open_strict
from mambactl.checkpoint.resolve import resolve
from mambactl.models.hybrid import HybridForCausalLM
from mambactl.models.mixers.sizes import FLOAT32_PARAMETERS


class Casts:
    """Types of a student's parameters: fp32 for `trained`, `dtype` for the frozen ones.

    A_log, D and dt_bias are fp32. `rounded` names those that lost digits so far.
    """

    def __init__(self, trained: Collection[str], dtype: torch.dtype):
        self.trained, self.dtype = trained, dtype
        self.rounded: list[str] = []

    def masters(self, name: str) -> bool:
        """True if a parameter keeps fp32."""
        return name in self.trained or name.rpartition(".")[2] in FLOAT32_PARAMETERS

    def __call__(self, name: str, own: Tensor) -> Tensor:
        """The value in the type of its parameter."""
        if self.masters(name):
            return own.float()
        cast = own.to(self.dtype)
        if not torch.equal(cast.to(own.dtype), own):
            self.rounded.append(name)
        return cast


class Sharing(NamedTuple):
    """Names of frozen parameters that share the teacher's memory, and that the cast rounded."""

    shared: list[str]
    rounded: list[str]


@torch.no_grad()
def share_frozen(
    student: nn.Module, teacher: nn.Module | None, trained: Collection[str], dtype: torch.dtype
) -> Sharing:
    """Give every parameter of the student its device and type, one at a time.

    `trained` names those that train in any phase: they become fp32. Of the others, those equal to
    the teacher's parameter of that name, once both are in `dtype`, become views of it; the rest is
    cast to `dtype` (A_log, D and dt_bias stay fp32). Load the student in its stored type: fp32
    would need twice the memory, and bf16 would round the masters. Raises ValueError for a trained
    name that the student has not.
    """
    parameters = dict(student.named_parameters())
    unknown = sorted(set(trained) - parameters.keys())
    if unknown:
        raise ValueError(f"the student has no parameters {', '.join(unknown)}")
    theirs = {} if teacher is None else dict(teacher.named_parameters())
    casts = Casts(trained, dtype)
    found = Sharing([], casts.rounded)
    for name, parameter in parameters.items():
        cast = casts(name, parameter.data)
        other = None if casts.masters(name) else theirs.get(name)
        if other is not None and _same(cast, other.data):
            cast = other.data
            found.shared.append(name)
        parameter.data = cast
    return found


def restore(student: nn.Module, names: Collection[str], read: Callable[[str], Tensor]) -> None:
    """Restore rounded parameters, before saving, from the checkpoint of the student."""
    parameters = dict(student.named_parameters())
    for name in names:
        parameters[name].data = read(name)


def put_back(model: HybridForCausalLM, names: Collection[str], source: str) -> None:
    """`restore` from the checkpoint that the model was read from."""
    reader, adapted = open_strict(resolve(source))
    with reader:
        restore(model, names, lambda key: adapted.get(reader, key).to(model.device))


def _same(ours: Tensor, theirs: Tensor) -> bool:
    alike = ours.dtype == theirs.dtype and ours.device == theirs.device
    return alike and ours.shape == theirs.shape and torch.equal(ours, theirs)
