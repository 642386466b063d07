"""The layers of a model, as a configuration describes them; torch is not needed."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeAlias, TypeVar

from mambactl.models.mixers.sections import check_section
from mambactl.models.mixers.settings import WindowSettings
from mambactl.models.mixers.sizes import MixerSizes
from mambactl.present import present

# settings of one section of all layers, or of each layer (None where its mixer reads none)
Section = dict | list[dict | None] | None
M = TypeVar("M", bound=MixerSizes[Any])


@dataclass(frozen=True)
class Layer(Generic[M]):
    """The mixer of one layer: its spec, or its sizes alone, and the settings of this layer."""

    index: int
    spec: M
    settings: Any


class MixerLayout(Generic[M]):
    """Properties derived from the mixers of a configuration and their sections.

    `mixer_table` says what is known of a mixer by its name.
    """

    mixer_table: Mapping[str, M]
    mixers: list[str]
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int

    def stored(self, section: str) -> Section:
        """A section as the configuration holds it."""
        return getattr(self, section, None)

    @property
    def layers(self) -> list[Layer[M]]:
        """Mixer and settings of every layer."""
        return [self.layer(index) for index in range(len(self.mixers))]

    def layer(self, index: int) -> Layer[M]:
        """Mixer and settings of one layer; KeyError for a mixer that is not in the table."""
        spec = self.mixer_table[self.mixers[index]]
        sections = {name: present(self._values(name, index)) for name in spec.sections}
        return Layer(index, spec, spec.settings(sections))

    def _values(self, section: str, index: int) -> dict | None:
        values = self.stored(section)
        return values[index] if isinstance(values, list) else values

    @property
    def sees_all(self) -> bool:
        """True if heads of any layer attend to all of the past."""
        return any(layer.spec.sees_all for layer in self.layers)

    @property
    def replaced_layers(self) -> list[int]:
        """Indices of the layers with another mixer than attention alone."""
        return [layer.index for layer in self.layers if not layer.spec.is_attention]

    @property
    def windows(self) -> list[WindowSettings]:
        """Distinct windows of attention beside recurrences, in the order of the layers."""
        found = (layer.spec.window(layer.settings) for layer in self.layers)
        return list(dict.fromkeys(window for window in found if window is not None))

    @property
    def rotates(self) -> bool:
        """True if recurrent states of any layer rotate with the position."""
        return any(layer.spec.rotates(layer.settings) for layer in self.layers)

    @property
    def stores_every_step(self) -> bool:
        """True if replaying tokens would cost a layer as much as storing its state."""
        return any(layer.spec.stores_every_step for layer in self.layers)

    def check_mixers(self) -> None:
        """Raise ValueError for mixers that are not in the table, and for sections with faults."""
        if len(self.mixers) != self.num_hidden_layers:
            raise ValueError(
                f"{len(self.mixers)} mixers for {self.num_hidden_layers} layers in the config"
            )
        for name in dict.fromkeys(self.mixers):
            if name not in self.mixer_table:
                raise ValueError(f"unknown mixer {name!r}; known: {', '.join(self.mixer_table)}")
            for section in self.mixer_table[name].sections:
                self._check_section(name, section)

    def check_heads(self) -> None:
        """Raise ValueError for heads that do not fit each other."""
        heads, shared = self.num_attention_heads, self.num_key_value_heads
        if heads % shared:
            raise ValueError(f"{heads} attention heads are no multiple of {shared} key-value heads")
        if self.sees_all and self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd: rotary positions turn pairs")

    def check_settings(self) -> None:
        """Raise ValueError for settings of a layer that contradict the model around it."""
        for layer in self.layers:
            layer.spec.check(self, layer.settings)

    def _check_section(self, name: str, section: str) -> None:
        values = self.stored(section)
        if values is None:
            raise ValueError(f"the config uses {name} layers but has no `{section}` settings")
        kind = self.mixer_table[name].sections[section]
        if not isinstance(values, list):
            return self._check_values(section, kind, values)
        if len(values) != self.num_hidden_layers:
            raise ValueError(
                f"`{section}` has settings of {len(values)} layers, the config "
                f"{self.num_hidden_layers}"
            )
        for index, mixer in enumerate(self.mixers):
            if mixer == name and values[index] is None:
                raise ValueError(f"layer {index} is {name} but has no `{section}` settings")
            if mixer == name:
                self._check_values(section, kind, values[index])
        return None

    def _check_values(self, section: str, kind: type, values: object) -> None:
        try:
            check_section(kind, values)
        except ValueError as error:
            raise ValueError(f"`{section}` {error}") from error


# of a model, or of a checkpoint of which only the headers are read
AnyLayout: TypeAlias = MixerLayout[Any]
