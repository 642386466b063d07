"""The checkpoint of `--mixers-from`: mixers that are taken ready-made instead of being made."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from mambactl.checkpoint.adapted import Adapted
from mambactl.checkpoint.load import open_strict
from mambactl.checkpoint.reader import Reader
from mambactl.checkpoint.resolve import resolve
from mambactl.errors import UsageError
from mambactl.models.config import HybridConfig
from mambactl.models.mixers.registry import MIXERS
from mambactl.models.mixers.spec import AnySpec

# what must be equal for the mixers of one checkpoint to work in another
SHAPE = (
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "has_mlp",
)

# layer -> its new mixer, and the KV heads that keep attention beside it
Wanted = Mapping[int, tuple[AnySpec, tuple[int, ...]]]


@dataclass(frozen=True)
class Aligned:
    """An open checkpoint whose mixers are taken."""

    spec: str
    reader: Reader
    adapted: Adapted

    def mixer(self, index: int) -> dict[str, Tensor]:
        """The tensors of one mixer by their names in it."""
        spec = self.adapted.config.layer(index).spec
        prefix = f"model.layers.{index}.{spec.attribute}."
        names = [name for name in self.adapted.names if name.startswith(prefix)]
        return {name.removeprefix(prefix): self.adapted.get(self.reader, name) for name in names}

    def require(self, base: HybridConfig, wanted: Wanted) -> None:
        """Raise UsageError where its mixers cannot be taken into a model with the shape `base`."""
        theirs = self.adapted.config
        different = [name for name in SHAPE if getattr(theirs, name) != getattr(base, name)]
        if different:
            raise UsageError(
                f"{self.spec} is another model: it differs in {', '.join(different)}",
                "--mixers-from takes a converted checkpoint of the model that is converted here",
            )
        # layers that lack a mixer, by the mixer that they lack
        missing: dict[str, list[int]] = {}
        for index, (spec, _) in wanted.items():
            if theirs.mixers[index] not in _sources(spec):
                missing.setdefault(spec.name, []).append(index)
        for name, layers in missing.items():
            raise UsageError(
                f"{self.spec} has no {name} mixer in the layers {layers}",
                _ready_made(theirs, MIXERS[name]),
            )
        present = theirs.attention_heads
        absent = [
            f"{index}.{head}"
            for index, (_, kept) in wanted.items()
            for head in present[index]
            if head not in kept
        ]
        if absent:
            raise UsageError(
                f"{self.spec} has no mixer for the KV heads {', '.join(absent)}",
                "keep them too, or align all heads once: convert --by head --ratio 1, then "
                "distill --stages align",
            )


@contextmanager
def open_aligned(spec: str | None) -> Iterator[Aligned | None]:
    """The checkpoint of `--mixers-from`, or None where there is none."""
    if spec is None:
        yield None
        return
    reader, adapted = open_strict(resolve(spec))
    with reader:
        yield Aligned(spec, reader, adapted)


def _sources(spec: AnySpec) -> set[str]:
    """Names of the mixers from which one can be taken."""
    wider = {other.name for other in MIXERS.values() if other.with_kept_heads == spec.name}
    return {spec.name} | wider | ({spec.with_kept_heads} if spec.with_kept_heads else set())


def _ready_made(theirs: HybridConfig, spec: AnySpec) -> str:
    """Hint that says which checkpoint has mixers of the kind `spec`."""
    if spec.with_window in theirs.mixers:
        window = theirs.windows[0]
        return f"its mixers have windows: add --window {window.window} --sinks {window.sinks}"
    return "align all layers once: convert --ratio 1, then distill --stages align"
