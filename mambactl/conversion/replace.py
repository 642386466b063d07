"""How one attention layer becomes a Mamba layer: initialised, fitted, or taken ready-made.

A ready-made mixer comes from a checkpoint of the same model whose mixers have been aligned
(`--mixers-from`), so that one alignment serves every choice of layers.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from mambactl import console
from mambactl.checkpoint.adapters import Adapted
from mambactl.checkpoint.load import open_strict
from mambactl.checkpoint.reader import Reader
from mambactl.checkpoint.resolve import resolve
from mambactl.conversion.fit import LayerFit, Streams, attention_weights
from mambactl.conversion.initial_values import initialise
from mambactl.errors import ModelError, UsageError
from mambactl.models.config import (
    MIXER_SETTINGS,
    HybridConfig,
    Mamba2Settings,
    MixerSettings,
    WindowSettings,
    mamba1_from_attention,
    mamba2_from_attention,
)
from mambactl.models.hybrid import HybridBlock
from mambactl.options import ConvertConfig

# what must be equal for the mixers of one checkpoint to work in another
SHAPE = (
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "has_mlp",
)


@dataclass(frozen=True)
class Aligned:
    """An open checkpoint whose mixers are taken."""

    spec: str
    reader: Reader
    adapted: Adapted

    def mixer(self, index: int) -> dict[str, Tensor]:
        """The tensors of one Mamba mixer by their names in it."""
        prefix = f"model.layers.{index}.mamba."
        names = [name for name in self.adapted.names if name.startswith(prefix)]
        return {name.removeprefix(prefix): self.adapted.get(self.reader, name) for name in names}


@contextmanager
def open_aligned(spec: str | None) -> Iterator[Aligned | None]:
    """The checkpoint of `--mixers-from`, or None where there is none."""
    if spec is None:
        yield None
        return
    reader, adapted = open_strict(resolve(spec))
    with reader:
        yield Aligned(spec, reader, adapted)


@dataclass(frozen=True)
class Replacement:
    """Makes the replaced layers of one conversion of a model with the configuration `base`."""

    config: ConvertConfig
    base: HybridConfig
    aligned: Aligned | None = None

    @cached_property
    def everywhere(self) -> HybridConfig:
        """The configuration with every attention layer replaced; raises UsageError, ModelError."""
        return self.target([])

    @property
    def kind(self) -> str:
        """The mixer that replaces attention, by its name in a configuration."""
        return "mamba2_window" if self.config.window else self.config.mixer

    def target(self, kept: list[int]) -> HybridConfig:
        """The configuration when attention stays in `kept`; raises UsageError, ModelError."""
        base, mixer = self.base, self.kind
        mixers = [
            mixer if name == "attention" and index not in kept else name
            for index, name in enumerate(base.mixers)
        ]
        new = [i for i, name in enumerate(base.mixers) if name != mixers[i]]
        if new and self.aligned is not None:
            _require_same_model(self.aligned, base, mixer, new)
            self._require_same_window()
        settings = {name: self._settings(name) for name in MIXER_SETTINGS[mixer]} if new else {}
        target = base.with_mixers(mixers, **settings)
        if self.config.dtype != "auto":
            target.dtype = self.config.dtype
        return target

    def _settings(self, kind: str) -> MixerSettings:
        """Form of the new mixers; layers of one kind share theirs, or this raises UsageError."""
        if self.aligned is None:
            wanted = _wanted_settings(self.base, self.config, kind)
        else:
            wanted = getattr(self.aligned.adapted.config, f"{kind}_settings")
            if self.config.rotary and kind == "mamba2" and not wanted.rotary:
                raise UsageError(
                    f"the mixers of {self.aligned.spec} are not rotary", "drop --rotary"
                )
        if not any(kind in MIXER_SETTINGS[name] for name in self.base.mixers):
            return wanted
        present = getattr(self.base, f"{kind}_settings")
        if isinstance(present, WindowSettings):
            if wanted != present:
                raise UsageError(
                    f"this model has windows of {present.window} tokens and {present.sinks} sinks",
                    f"give --window {present.window} --sinks {present.sinks}",
                )
            return present
        _require_same_turning(wanted, present)
        # a bias that is not needed stays zero
        loose = self.aligned is None and (wanted.proj_bias or present.proj_bias)
        if (replace(wanted, proj_bias=True) if loose else wanted) != present:
            origin = self.aligned.spec if self.aligned else f"--init {self.config.init}"
            raise UsageError(
                f"the {kind} layers of this model have another form than {origin} gives to "
                "new ones",
                "use the --init (or --mixers-from) that made them, or the other --mixer",
            )
        return present

    def _require_same_window(self) -> None:
        if not self.config.window:
            return
        asked = _wanted_window(self.config)
        theirs = self.aligned.adapted.config.mamba2_window_settings
        if asked != theirs:
            raise UsageError(
                f"the mixers of {self.aligned.spec} have a window of {theirs.window} tokens and "
                f"{theirs.sinks} sinks",
                f"give --window {theirs.window} --sinks {theirs.sinks}",
            )

    def layer(
        self,
        index: int,
        state: Mapping[str, Tensor],
        streams: Streams | None = None,
        fits: dict[int, LayerFit] | None = None,
    ) -> dict[str, Tensor]:
        """The state of a replaced layer; MLP and norms are the tensors of `state`.

        With `streams` the mixer is fitted and both streams advance; `fits` takes the report.
        """
        if self.aligned is not None:
            kept = {k: v for k, v in state.items() if not k.startswith("self_attn.")}
            self._warn_of_other_rest(index, kept)
            return kept | {f"mamba.{k}": v for k, v in self.aligned.mixer(index).items()}
        teacher = block_of(self.base, index, state)
        if streams is not None:
            teacher = teacher.float()
        with torch.device("meta"):
            student = HybridBlock(self.everywhere, index).eval().requires_grad_(False)
        student.mixer.to_empty(device="cpu")
        kept = {k: v for k, v in teacher.state_dict().items() if not k.startswith("self_attn.")}
        student.load_state_dict(kept, strict=False, assign=True)
        drawn = generator(self.config.seed, index)
        initialise(student.mixer, attention_weights(teacher), self.config.init, drawn)
        if streams is not None:
            fit = streams.replace(teacher, student)
            if fits is not None:
                fits[index] = fit
        return {name: state.get(name, tensor) for name, tensor in student.state_dict().items()}

    def _warn_of_other_rest(self, index: int, kept: Mapping[str, Tensor]) -> None:
        name = "input_layernorm.weight"
        theirs = self.aligned.adapted.get(self.aligned.reader, f"model.layers.{index}.{name}")
        if not torch.equal(theirs, kept[name].to(theirs.dtype)):
            console.warn(
                f"layer {index} of {self.aligned.spec} differs from this model beyond its mixer: "
                "its mixers were trained for other inputs"
            )


def generator(*numbers: int) -> torch.Generator:
    """A generator that `numbers` decide."""
    seed = 0
    for number in numbers:
        seed = seed * 1_000_003 + number
    return torch.Generator().manual_seed(seed)


def block_of(config: HybridConfig, index: int, state: Mapping[str, Tensor]) -> HybridBlock:
    """A block around the tensors of `state`, which it does not copy."""
    with torch.device("meta"):
        block = HybridBlock(config, index)
    block.load_state_dict(state, strict=True, assign=True)
    return block.eval().requires_grad_(False)


def _require_same_turning(wanted: MixerSettings, present: MixerSettings) -> None:
    """Raise UsageError where of the mixers of one model only some would be rotary."""
    if isinstance(wanted, Mamba2Settings) and wanted.rotary != present.rotary:
        raise UsageError(
            f"the mamba2 layers of this model are {'' if present.rotary else 'not '}rotary",
            f"{'add' if present.rotary else 'drop'} --rotary, or take --mixers-from of their form",
        )


def _wanted_window(config: ConvertConfig) -> WindowSettings:
    if config.sinks is None:
        return WindowSettings(config.window)
    return WindowSettings(config.window, config.sinks)


def _wanted_settings(base: HybridConfig, config: ConvertConfig, kind: str) -> MixerSettings:
    calibrated = config.init == "calibrated"
    bias = calibrated or base.attention_bias
    if kind == "mamba2_window":
        return _wanted_window(config)
    if kind == "mamba2":
        return mamba2_from_attention(base, proj_bias=bias, rotary=config.rotary)
    if base.head_dim % 16:
        raise ModelError(
            f"mamba1 needs a head size divisible by 16, this model has {base.head_dim}",
            "use --mixer mamba2",
        )
    # the public code pairs 16-channel groups; whole heads keep each query with its own key
    return mamba1_from_attention(base, base.head_dim if calibrated else 16, proj_bias=bias)


def _ready_made(theirs: HybridConfig, mixer: str) -> str:
    """Where mixers of that name come from."""
    if mixer == "mamba2" and "mamba2_window" in theirs.mixers:
        window = theirs.mamba2_window_settings
        return f"its mixers have windows: add --window {window.window} --sinks {window.sinks}"
    return "align all layers once: convert --ratio 1, then distill --stages align"


def _require_same_model(
    aligned: Aligned, base: HybridConfig, mixer: str, needed: list[int]
) -> None:
    theirs = aligned.adapted.config
    different = [name for name in SHAPE if getattr(theirs, name) != getattr(base, name)]
    if different:
        raise UsageError(
            f"{aligned.spec} is another model: it differs in {', '.join(different)}",
            "--mixers-from takes a converted checkpoint of the model that is converted here",
        )
    if missing := [index for index in needed if theirs.mixers[index] != mixer]:
        raise UsageError(
            f"{aligned.spec} has no {mixer} mixer in the layers {missing}",
            _ready_made(theirs, mixer),
        )
