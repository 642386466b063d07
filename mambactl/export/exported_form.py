"""A model in the form of another program, made tensor by tensor."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mambactl.checkpoint.adapted import Adapted, in_dtype
from mambactl.checkpoint.container import Shape, joined_shape
from mambactl.checkpoint.reader import Reader
from mambactl.checkpoint.save import stored_dtype
from mambactl.errors import ModelError
from mambactl.json_values import JsonObject
from mambactl.models.config import HybridConfig

PORTABLE = "`mambactl convert TEACHER --form portable` makes one that can be exported"


@dataclass(frozen=True)
class Origin:
    """The checkpoint that is exported: its name in messages, and its open reader."""

    spec: str
    reader: Reader
    adapted: Adapted

    @property
    def config(self) -> HybridConfig:
        """The configuration of the model."""
        return self.adapted.config

    @property
    def names(self) -> list[str]:
        """Our names of its tensors, in the order of its files."""
        return list(self.adapted.names)

    def described(self, name: str) -> Tensor:
        """A tensor's shape and type, without its values."""
        theirs = self.adapted.names[name]
        dtype = stored_dtype(name, self.reader.dtype(theirs))
        return torch.empty(self.reader.shape(theirs), dtype=dtype, device="meta")

    def get(self, name: str) -> Tensor:
        """One tensor; A_log, D and dt_bias are fp32. ModelError where it is not finite."""
        tensor = self.adapted.get(self.reader, name)
        return tensor.to(stored_dtype(name, tensor.dtype))


# a tensor, or parts of one that lie one behind the other: joining them would copy most weights
Written = Tensor | tuple[Tensor, ...]
# how a tensor of ours is stored
Change = Callable[[Tensor], Written]


@dataclass(frozen=True)
class Step:
    """Tensors of a checkpoint that are read together, and `make`, which returns what they become.

    `make` takes them in the order of `sources` and returns tensors by their new names; it also runs
    on tensors without values, to say what will be written.
    """

    sources: tuple[str, ...]
    make: Callable[..., Mapping[str, Written]]


@dataclass(frozen=True)
class Form:
    """A model as another program stores it.

    `config` is its config.json, or the metadata of a GGUF; `files` are texts beside it; `aliases`
    are further names of tensors; `since` is the first version of transformers that computes it,
    where earlier ones load it as well.
    """

    architecture: str
    config: JsonObject
    steps: list[Step]
    files: dict[str, str | bytes] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    since: str | None = None

    @property
    def note(self) -> str | None:
        """Notes on this format for whoever loads it."""
        return self.since and (
            f"It needs transformers {self.since} or newer: earlier versions load it without an "
            "error and compute something else, as they norm all groups of a Mamba-2 layer together."
        )

    def shapes(
        self, origin: Origin, dtype: torch.dtype | None
    ) -> dict[str, tuple[Shape, torch.dtype]]:
        """Shape and type of everything that `tensors` yields."""
        found = {}
        for step in self.steps:
            for name, written in step.make(*map(origin.described, step.sources)).items():
                parts = _parts(written)
                kind = parts[0].dtype if dtype is None else stored_dtype(name, dtype)
                found[name] = (joined_shape(parts), kind)
        return found

    def tensors(
        self, origin: Origin, shapes: Mapping[str, tuple[Shape, torch.dtype]]
    ) -> Iterator[tuple[str, tuple[Tensor, ...]]]:
        """Every tensor of the form, in parts; memory holds those of one step."""
        for step in self.steps:
            for name, written in step.make(*map(origin.get, step.sources)).items():
                kind = shapes[name][1]
                yield name, tuple(in_dtype(name, part, kind) for part in _parts(written))


def _parts(written: Written) -> tuple[Tensor, ...]:
    return written if isinstance(written, tuple) else (written,)


def renamed(source: str, name: str) -> Step:
    """A tensor that has only another name."""
    return Step((source,), lambda tensor: {name: tensor})


def changed(source: str, name: str, change: Change) -> Step:
    """A tensor that has another name and is stored in another way."""
    return Step((source,), lambda tensor: {name: change(tensor)})


def cannot_hold(origin: Origin, what: str, form: str, hint: str | None = PORTABLE) -> ModelError:
    """The refusal of a model that a form has no room for."""
    return ModelError(f"{origin.spec} {what}, which {form} cannot hold", hint)
