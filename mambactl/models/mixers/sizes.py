"""Sizes of a mixer's cache, in numbers, from its settings alone; torch is not needed.

The spec of a mixer (`mambactl.models.mixers.spec`) is one of these classes with all else that the
program asks of a mixer. What describes a checkpoint by its headers takes `SIZES` instead.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from mambactl.models.mixers.sections import check_sizes
from mambactl.models.mixers.settings import (
    KeptHeads,
    Mamba1Settings,
    Mamba2Settings,
    MixedSettings,
    WindowedSettings,
    WindowSettings,
)

S = TypeVar("S")
# parameters that are fp32 whatever the type of the model is
FLOAT32_PARAMETERS = ("A_log", "D", "dt_bias")


class HeadSizes(Protocol):
    """Fields of a configuration that sizes of mixers depend on."""

    @property
    def num_attention_heads(self) -> int: ...

    @property
    def num_key_value_heads(self) -> int: ...

    @property
    def head_dim(self) -> int: ...


class MixerSizes(Generic[S]):
    """Sizes of one mixer; `S` is the dataclass of its settings, of one layer.

    `sections` are the sections of the configuration that hold them: settings of one section are
    that section's dataclass, settings of several a dataclass with a field for each. Layers may
    have settings of their own.
    """

    # in a configuration's list of mixers
    name: ClassVar[str]
    sections: ClassVar[Mapping[str, type]] = {}

    is_attention: ClassVar[bool] = False
    # whether any of its heads sees all of the past
    sees_all: ClassVar[bool] = False
    # whether replaying tokens in decoding would cost as much as storing the state after each
    stores_every_step: ClassVar[bool] = False

    def settings(self, sections: Mapping[str, Mapping[str, object]]) -> S:
        """Settings of a layer from the values of its sections."""
        parts = {name: kind(**sections[name]) for name, kind in self.sections.items()}
        return self.joined(parts)

    def joined(self, parts: Mapping[str, Any]) -> S:
        """Settings from the dataclasses of all sections."""
        (only,) = parts.values()
        return only

    def parts(self, settings: S) -> dict[str, object]:
        """The dataclass of every section."""
        if len(self.sections) == 1:
            return {next(iter(self.sections)): settings}
        return {name: getattr(settings, name) for name in self.sections}

    def check(self, config: HeadSizes, settings: S) -> None:
        """Raise ValueError for settings that contradict the model around them."""

    def window(self, settings: S) -> WindowSettings | None:
        """The window of attention beside the recurrence."""
        return None

    def kept_heads(self, config: HeadSizes, settings: S) -> tuple[int, ...]:
        """KV heads that attend to all of the past."""
        return ()

    def rotates(self, settings: S) -> bool:
        """True if the state rotates with the position."""
        return False

    def state_elements(self, settings: S) -> int:
        """Numbers in the recurrent state of one sequence."""
        return 0

    def kv_elements(self, config: HeadSizes, settings: S) -> int:
        """Numbers in the keys and values of one token."""
        return 0

    def full_kv_elements(self, config: HeadSizes, settings: S) -> int:
        """Numbers in the keys and values of one token that every later token sees."""
        return 2 * config.head_dim * len(self.kept_heads(config, settings))

    def window_kv_elements(self, config: HeadSizes, settings: S) -> int:
        """Numbers in the keys and values of one token that a window beside a recurrence sees."""
        whole = self.kv_elements(config, settings)
        return whole - self.full_kv_elements(config, settings)

    def ring_elements(self, settings: S) -> int:
        """Numbers in the projections of one token, from which a state is replayed."""
        return 0

    def conv_elements(self, settings: S) -> int:
        """Numbers in the previous inputs of the convolution of one sequence."""
        return 0


class AttentionSizes(MixerSizes[None]):
    """Attention over all of the past, or the sliding window of the model."""

    name = "attention"
    is_attention = True

    sees_all = True

    def settings(self, sections: object) -> None:
        """Return None: attention takes its sizes from the model."""
        return None

    def kv_elements(self, config: HeadSizes, settings: None) -> int:
        """Numbers in the keys and values of one token."""
        return 2 * config.num_key_value_heads * config.head_dim

    def kept_heads(self, config: HeadSizes, settings: None) -> tuple[int, ...]:
        """Indices of all KV heads."""
        return tuple(range(config.num_key_value_heads))


class Mamba1Sizes(MixerSizes[Mamba1Settings]):
    """Mamba-1, in the form of attention or native."""

    name = "mamba1"
    sections = {"mamba1": Mamba1Settings}

    # its ring is nearly as large as its state
    stores_every_step = True

    def check(self, config: HeadSizes, settings: Mamba1Settings) -> None:
        """Raise ValueError for sizes that do not fit each other."""
        alone = ("d_inner", "dt_rank", "d_state", "d_conv")
        check_sizes(settings, *((name, name) for name in alone))
        if not settings.native:
            pairs = (("d_inner", "x_dim"), ("x_dim", "repeat_width"), ("d_inner", "d_state"))
            check_sizes(settings, *pairs)

    def state_elements(self, settings: Mamba1Settings) -> int:
        """Numbers in the recurrent state of one sequence."""
        return settings.d_inner * settings.d_state

    def ring_elements(self, settings: Mamba1Settings) -> int:
        """Numbers in the projections of one token, from which a state is replayed."""
        return sum(settings.ring_widths)

    def conv_elements(self, settings: Mamba1Settings) -> int:
        """Numbers in the previous inputs of the convolution of one sequence."""
        return (settings.d_conv - 1) * settings.d_inner


class Mamba2Sizes(MixerSizes[Mamba2Settings]):
    """Mamba-2 alone, in the form of attention or native."""

    name = "mamba2"
    sections = {"mamba2": Mamba2Settings}

    def check(self, config: HeadSizes, settings: Mamba2Settings) -> None:
        """Raise ValueError for sizes that do not fit each other, or the model's angles."""
        heads, groups = "n_heads", ("x_heads", "b_groups", "c_groups")
        check_sizes(
            settings,
            *((heads, part) for part in groups),
            ("d_inner", "norm_groups"),
            *((name, name) for name in ("d_state", "d_conv", "chunk_size")),
        )
        if settings.rotary and settings.d_state != config.head_dim:
            raise ValueError(
                f"rotary mamba2 states have {settings.d_state} channels, the angles of this model "
                f"{config.head_dim}"
            )

    def rotates(self, settings: Mamba2Settings) -> bool:
        """True if B and C rotate with the position."""
        return settings.rotary

    def state_elements(self, settings: Mamba2Settings) -> int:
        """Numbers in the recurrent state of one sequence."""
        return settings.d_inner * settings.d_state

    def ring_elements(self, settings: Mamba2Settings) -> int:
        """Numbers in the projections of one token, from which a state is replayed."""
        return sum(settings.ring_widths)

    def conv_elements(self, settings: Mamba2Settings) -> int:
        """Numbers in the previous inputs of the convolution of one sequence."""
        return (settings.d_conv - 1) * settings.conv_dim


RECURRENCE = Mamba2Sizes()


W = TypeVar("W", bound=WindowedSettings)


class BesideSizes(MixerSizes[W]):
    """Mamba-2 beside attention to a window, alone or beside kept heads."""

    def check(self, config: HeadSizes, settings: W) -> None:
        """Raise ValueError for sizes that do not fit each other, or the model's angles."""
        RECURRENCE.check(config, settings.mamba2)
        check_sizes(settings.mamba2_window, ("window", "window"))

    def window(self, settings: W) -> WindowSettings:
        """The window of attention beside the recurrence."""
        return settings.mamba2_window

    def rotates(self, settings: W) -> bool:
        """True if B and C rotate with the position."""
        return RECURRENCE.rotates(settings.mamba2)

    def state_elements(self, settings: W) -> int:
        """Numbers in the recurrent state of one sequence."""
        return RECURRENCE.state_elements(settings.mamba2)

    def ring_elements(self, settings: W) -> int:
        """Numbers in the projections of one token, from which a state is replayed."""
        return RECURRENCE.ring_elements(settings.mamba2)

    def conv_elements(self, settings: W) -> int:
        """Numbers in the previous inputs of the convolution of one sequence."""
        return RECURRENCE.conv_elements(settings.mamba2)

    def kv_elements(self, config: HeadSizes, settings: W) -> int:
        """Numbers in the keys and values of one token."""
        return 2 * config.num_key_value_heads * config.head_dim


class WindowedSizes(BesideSizes[WindowedSettings]):
    """Mamba-2 beside attention to a window."""

    name = "mamba2_window"
    sections = {"mamba2": Mamba2Settings, "mamba2_window": WindowSettings}

    def joined(self, parts: Mapping[str, Any]) -> WindowedSettings:
        """Settings from the dataclasses of both sections."""
        return WindowedSettings(**parts)


class MixedSizes(BesideSizes[MixedSettings]):
    """Full attention of some KV heads, Mamba-2 beside a window in place of the others."""

    name = "mamba2_mixed"
    sections = {"mamba2": Mamba2Settings, "mamba2_window": WindowSettings, "kept_heads": KeptHeads}

    sees_all = True

    def joined(self, parts: Mapping[str, Any]) -> MixedSettings:
        """Settings from the dataclasses of all sections."""
        return MixedSettings(**parts)

    def check(self, config: HeadSizes, settings: MixedSettings) -> None:
        """Raise ValueError for heads that the model has not, or a recurrence of other heads."""
        super().check(config, settings)
        count, kept = config.num_key_value_heads, settings.kept_heads.heads
        if list(kept) != sorted(set(kept) & set(range(count))) or not 0 < len(kept) < count:
            raise ValueError(f"kept_heads {list(kept)} of {count} KV heads: some, in order, from 0")
        shared = config.num_attention_heads // count
        wanted = (count - len(kept)) * shared
        if settings.mamba2.n_heads != wanted:
            raise ValueError(
                f"{settings.mamba2.n_heads} mamba2 heads beside {len(kept)} kept KV heads of "
                f"{count}: {wanted} are needed"
            )

    def kept_heads(self, config: HeadSizes, settings: MixedSettings) -> tuple[int, ...]:
        """KV heads that attend to all of the past."""
        return tuple(settings.kept_heads.heads)


SIZES: dict[str, MixerSizes[Any]] = {
    sizes.name: sizes
    for sizes in (AttentionSizes(), Mamba2Sizes(), Mamba1Sizes(), WindowedSizes(), MixedSizes())
}
