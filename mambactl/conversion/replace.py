"""Turn the attention of one layer, or some KV heads of it, into a mixer: initialised, fitted, or
taken ready-made.

A ready-made mixer comes from a checkpoint of the same model whose mixers have been aligned
(`--mixers-from`), so that one alignment serves every choice of layers.
"""

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from mambactl import console
from mambactl.checkpoint.adapted import finite
from mambactl.conversion.aligned import Aligned
from mambactl.conversion.fit import LayerFit, Streams
from mambactl.errors import CheckError, UsageError
from mambactl.models.block import HybridBlock
from mambactl.models.config import HybridConfig
from mambactl.models.mixers.attention import weights_of
from mambactl.models.mixers.registry import ATTENTION, MIXERS
from mambactl.models.mixers.settings import KeptHeads, Mamba2Settings, WindowSettings
from mambactl.models.mixers.spec import AnySpec, MixerForm
from mambactl.options import ConvertConfig
from mambactl.present import present

# layer -> KV heads that keep attention to all of the past
Kept = Mapping[int, tuple[int, ...]]


def kept_attention(layers: int, ratio: float, keep: list[int] | None = None) -> list[int]:
    """Layers that stay attention; `keep` overrides `ratio`. Raises UsageError when out of range.

    A ratio 1 - 1/n keeps layer i where i mod n == n - 1 and a ratio 1/n replaces i mod n == 0, as
    the models of arXiv 2408.15237 do; any other ratio spreads the kept layers evenly.
    """
    if keep is not None:
        wrong = [index for index in keep if not 0 <= index < layers]
        if wrong:
            raise UsageError(
                f"there is no layer {', '.join(map(str, wrong))} in a model of {layers} layers",
                f"layers to keep are numbered 0 to {layers - 1}",
            )
        return sorted(set(keep))
    if not 0 <= ratio <= 1:
        raise UsageError(f"ratio {ratio} is not between 0 and 1", "give, for example, --ratio 0.5")
    share = Fraction(ratio).limit_denominator(max(64, layers))
    if share == 1:
        return []
    if (1 / (1 - share)).denominator == 1:
        period = int(1 / (1 - share))
        return [index for index in range(layers) if index % period == period - 1]
    if (1 / share).denominator == 1:
        return [index for index in range(layers) if index % int(1 / share)]
    kept = layers - round(share * layers)
    return [(j + 1) * layers // kept - 1 for j in range(kept)]


def attention_to_keep(
    config: HybridConfig, ratio: float, kv_budget: int | None, itemsize: int
) -> int:
    """Number of layers that stay attention: what `ratio` leaves, or what fits in `kv_budget`.

    The budget is in bytes of keys and values per token, `itemsize` bytes a number.
    """
    if kv_budget is not None:
        return min(len(config.attention_layers), kv_budget // attention_bytes(config, itemsize))
    kept = kept_attention(config.num_hidden_layers, ratio)
    return len(set(kept) & set(config.attention_layers))


def attention_bytes(config: HybridConfig, itemsize: int) -> int:
    """Bytes of the keys and values that one attention layer keeps of one token."""
    return 2 * config.num_key_value_heads * config.head_dim * itemsize


@dataclass(frozen=True)
class Replacement:
    """Makes the replaced layers of one conversion of a model with the configuration `base`."""

    config: ConvertConfig
    base: HybridConfig
    aligned: Aligned | None = None

    def spec(self, kept: tuple[int, ...] = ()) -> AnySpec:
        """The mixer beside the KV heads `kept`; raises UsageError where the options name none."""
        spec = mixer_spec(self.config.mixer)
        spec = MIXERS[present(spec.with_window)] if self.config.window_size else spec
        return MIXERS[present(spec.with_kept_heads)] if kept else spec

    def form(self, kept: tuple[int, ...] = ()) -> MixerForm:
        """The form of a new mixer."""
        config = self.config
        return MixerForm(config.init, config.window_size, config.sinks, config.rotary, kept)

    def target(self, kept: Kept) -> HybridConfig:
        """The configuration when `kept` stays attention; raises UsageError, ModelError."""
        base, present = self.base, self.base.attention_heads
        new = {
            index: heads
            for index in base.attention_layers
            if (heads := kept.get(index, ())) != present[index]
        }
        if new and self.aligned is not None:
            self.aligned.require(
                base, {index: (self.spec(new[index]), new[index]) for index in new}
            )
            self._require_same_window()
        target = base.with_layers({index: self.mixer(index, heads) for index, heads in new.items()})
        if self.config.dtype != "auto":
            target.dtype = self.config.dtype
        return target

    def mixer(self, index: int, kept: tuple[int, ...]) -> tuple[AnySpec, Any]:
        """Spec and settings of a new mixer; UsageError where those present have another form."""
        spec = self.spec(kept)
        if self.aligned is None:
            settings = spec.from_attention(self.base, self.form(kept), index)
        else:
            theirs = self.aligned.adapted.config.layer(index).settings
            settings = spec.narrowed(self.base, theirs, kept)
        wanted = spec.parts(settings)
        return spec, spec.joined(
            {name: self._agreed(name, settings) for name, settings in wanted.items()}
        )

    def _agreed(self, section: str, wanted: Any) -> Any:
        """Settings that new layers share with those that the model already has."""
        origin = None if self.aligned is None else self.aligned.spec
        if self.aligned is not None and self.config.rotary and not getattr(wanted, "rotary", True):
            raise UsageError(f"the mixers of {origin} are not rotary", "drop --rotary")
        present = _present(self.base, section)
        if present is None or isinstance(wanted, KeptHeads):
            return wanted
        if isinstance(wanted, Mamba2Settings):
            present = present.with_heads_of(wanted)
        if isinstance(present, WindowSettings):
            if wanted != present:
                raise UsageError(
                    f"this model has windows of {present.window} tokens and {present.sinks} sinks",
                    f"give --window {present.window} --sinks {present.sinks}",
                )
            return present
        _require_same_rotation(section, wanted, present)
        # a bias that is not needed stays zero
        loose = origin is None and (_has_bias(wanted) or _has_bias(present))
        if (replace(wanted, proj_bias=True) if loose else wanted) != present:
            maker = origin or f"--init {self.config.init}"
            raise UsageError(
                f"the {section} layers of this model have another form than {maker} gives to "
                "new ones",
                "use the --init (or --mixers-from) that made them, or the other --mixer",
            )
        return present

    def _require_same_window(self) -> None:
        if not self.config.window_size:
            return
        spec = self.spec()
        asked = spec.window(spec.from_attention(self.base, self.form(), 0))
        aligned = present(self.aligned)
        for theirs in aligned.adapted.config.windows:
            if asked != theirs:
                raise UsageError(
                    f"the mixers of {aligned.spec} have a window of {theirs.window} tokens "
                    f"and {theirs.sinks} sinks",
                    f"give --window {theirs.window} --sinks {theirs.sinks}",
                )

    def layer(
        self,
        index: int,
        state: Mapping[str, Tensor],
        streams: Streams | None = None,
        fits: dict[int, LayerFit] | None = None,
        kept: tuple[int, ...] = (),
    ) -> dict[str, Tensor]:
        """The state of a layer that keeps attention in the KV heads `kept` alone.

        MLP and norms are the tensors of `state`. With `streams` the mixer is fitted and both
        streams advance; `fits` takes the report.
        """
        spec, settings = self.mixer(index, kept)
        teacher = block_of(self.base, index, state)
        weights = weights_of(teacher.attention, teacher.expected_input())
        if self.aligned is not None:
            rest = _without_attention(state)
            self._warn_of_other_rest(index, rest)
            theirs = self.aligned.adapted.config.layer(index)
            source = theirs.spec, theirs.settings
            found = spec.taken(self.aligned.mixer(index), source, settings, self.base, weights)
            return rest | {f"{spec.attribute}.{name}": found[name] for name in found}
        if streams is not None:
            teacher = teacher.float()
            weights = weights_of(teacher.attention, streams.expected_input(teacher))
        student = new_block(self.block_config(index, kept), index)
        student.mixer.to_empty(device="cpu")
        rest = _without_attention(teacher.state_dict())
        student.load_state_dict(rest, strict=False, assign=True)
        drawn = generator(self.config.seed, index)
        with torch.no_grad():
            spec.initialise(student.mixer, weights, self.config.init, drawn)
        if streams is not None:
            try:
                fit = streams.replace(teacher, student, spec)
            except torch.linalg.LinAlgError as error:  # pyright: ignore[reportPrivateImportUsage]
                raise _diverged(f"a matrix of layer {index}") from error
            _require_finite(index, fit, student)
            if fits is not None:
                fits[index] = fit
        return {name: state.get(name, tensor) for name, tensor in student.state_dict().items()}

    def block_config(self, index: int, kept: tuple[int, ...] = ()) -> HybridConfig:
        """A configuration in which layer `index` alone is replaced."""
        return self.base.with_layers({index: self.mixer(index, kept)})

    def _warn_of_other_rest(self, index: int, kept: Mapping[str, Tensor]) -> None:
        name = f"{'post_attention' if self.base.post_norm else 'input'}_layernorm.weight"
        aligned = present(self.aligned)
        theirs = aligned.adapted.get(aligned.reader, f"model.layers.{index}.{name}")
        if not torch.equal(theirs, kept[name].to(theirs.dtype)):
            console.warn(
                f"layer {index} of {aligned.spec} differs from this model beyond its mixer: "
                "its mixers were trained for other inputs"
            )


def _require_finite(index: int, fit: LayerFit, block: HybridBlock) -> None:
    """Raise CheckError where the fit of a layer became NaN or infinite."""
    for name, tensor in block.state_dict().items():
        if not finite(tensor):
            raise _diverged(f"model.layers.{index}.{name}")
    if not math.isfinite(fit.after_refit):
        raise _diverged(f"the error of layer {index}")


def _diverged(what: str) -> CheckError:
    return CheckError(
        f"{what} became NaN or infinite in the fit",
        "drop --calibrate, or give a checkpoint with smaller weights",
    )


def generator(*numbers: int) -> torch.Generator:
    """A generator that `numbers` decide."""
    seed = 0
    for number in numbers:
        seed = seed * 1_000_003 + number
    return torch.Generator().manual_seed(seed)


def new_block(config: HybridConfig, index: int) -> HybridBlock:
    """A block without storage."""
    with torch.device("meta"):
        return HybridBlock(config, index).eval().requires_grad_(False)


def block_of(config: HybridConfig, index: int, state: Mapping[str, Tensor]) -> HybridBlock:
    """A block around the tensors of `state`, which it does not copy."""
    with torch.device("meta"):
        block = HybridBlock(config, index)
    block.load_state_dict(state, strict=True, assign=True)
    return block.eval().requires_grad_(False)


def mixer_spec(name: str) -> AnySpec:
    """The spec of a mixer that can replace attention, by its name; raises UsageError."""
    forms = {name for spec in MIXERS.values() for name in (spec.with_window, spec.with_kept_heads)}
    able = [
        spec.name for spec in MIXERS.values() if not spec.is_attention and spec.name not in forms
    ]
    if name not in able:
        near = difflib.get_close_matches(name, able, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(able)}"
        raise UsageError(f"there is no mixer {name!r} that replaces attention", hint)
    return MIXERS[name]


def _without_attention(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k: v for k, v in state.items() if not k.startswith(f"{ATTENTION.attribute}.")}


def _present(base: HybridConfig, section: str) -> Any:
    """Settings of a section in the model that is converted, None where no layer has it."""
    for layer in base.layers:
        if section in layer.spec.sections:
            return layer.spec.parts(layer.settings)[section]
    return None


def _has_bias(settings: object) -> bool:
    return getattr(settings, "proj_bias", False)


def _require_same_rotation(section: str, wanted: object, present: Any) -> None:
    """Raise UsageError where of the mixers of one model only some would be rotary."""
    if getattr(wanted, "rotary", False) != getattr(present, "rotary", False):
        raise UsageError(
            f"the {section} layers of this model are {'' if present.rotary else 'not '}rotary",
            f"{'add' if present.rotary else 'drop'} --rotary, or take --mixers-from of their form",
        )
