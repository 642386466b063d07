"""The table of mixers: one spec each, by its name in a configuration."""

from torch import nn

from mambactl.models.mixers.attention import LOOKUP, AttentionSpec
from mambactl.models.mixers.mamba1 import Mamba1Spec
from mambactl.models.mixers.mamba2 import Mamba2Spec
from mambactl.models.mixers.mixed import MixedSpec
from mambactl.models.mixers.spec import AnySpec
from mambactl.models.mixers.windowed import Mamba2WindowSpec

ATTENTION = AttentionSpec()
MIXERS: dict[str, AnySpec] = {
    spec.name: spec
    for spec in (ATTENTION, Mamba2Spec(), Mamba1Spec(), Mamba2WindowSpec(), MixedSpec())
}


def spec_of(mixer: nn.Module) -> AnySpec:
    """The spec that a module was built from; KeyError for a module of no mixer."""
    for spec in MIXERS.values():
        if type(mixer) is spec.module_type:
            return spec
    raise KeyError(type(mixer).__name__)


def with_settings(settings: object) -> AnySpec:
    """The mixer whose settings are of this type; KeyError for another type."""
    for spec in MIXERS.values():
        if list(spec.sections.values()) == [type(settings)]:
            return spec
    raise KeyError(type(settings).__name__)


def part_of(name: str) -> tuple[AnySpec, str] | None:
    """Spec and inherited submodule ("" for the mixer's own) of a parameter, by its full name.

    None for parameters outside mixers. Wrappers may add any prefix to the name.
    """
    words = name.split(".")
    for spec in MIXERS.values():
        if spec.attribute not in words:
            continue
        rest = words[words.index(spec.attribute) + 1 :]
        for sharing in MIXERS.values():
            same = sharing.attribute == spec.attribute
            if same and rest and rest[0] in sharing.inherited:
                return sharing, rest[0]
        return spec, ""
    return None


def is_new(name: str) -> bool:
    """True if a parameter came with a mixer that replaced attention.

    Attention in a window beside a mixer is the teacher's, like the rest of the model.
    """
    found = part_of(name)
    return found is not None and not found[0].is_attention and not found[1]


def looks_up(name: str) -> bool:
    """True if a parameter is of the queries or keys of kept heads, or of the norms on them."""
    found = part_of(name)
    if found is None or found[0].keeps != found[1]:
        return False
    return not set(LOOKUP).isdisjoint(name.split("."))
