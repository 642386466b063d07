"""The form of new mixers: options that contradict it, and the engines that can load it."""

from collections.abc import Callable

from mambactl.conversion.replace import mixer_spec
from mambactl.errors import UsageError
from mambactl.models.config import HybridConfig
from mambactl.models.mixers.registry import MIXERS
from mambactl.models.mixers.spec import AnySpec
from mambactl.options import ConvertConfig


def check(asked: ConvertConfig, config: ConvertConfig) -> None:
    """Raise UsageError for options that contradict each other.

    `config` is what was asked for, completed with a form.
    """
    _check_choice(config)
    if config.sinks is not None and not config.window_size:
        raise UsageError("--sinks belong to a window", "add --window 64")
    spec = mixer_spec(config.mixer)
    windowed = _windowed_by(asked)
    if config.window_size and spec.with_window is None:
        raise _not_with(config, windowed, lambda other: other.with_window is not None)
    if config.rotary and not spec.can_rotate:
        raise _not_with(config, "--rotary", lambda other: other.can_rotate)
    if config.window_size and config.init != "calibrated":
        raise UsageError(
            f"{windowed} starts as the attention that it keeps, which --init reference would "
            "disturb",
            "drop one of the two",
        )
    if config.calibrate and config.init != "calibrated":
        raise UsageError("--calibrate needs --init calibrated", "drop one of the two")
    if config.calibrate and config.mixers_from:
        raise UsageError(
            "--calibrate fits new mixers, --mixers-from brings its own",
            "drop one of the two; text to choose layers on is --select-data",
        )
    if config.select == "uniform":
        if config.select_data:
            raise UsageError("--select-data is for --select kl or recall", "add --select kl")
        return
    for name in ("keep_attention", "keep_heads"):
        if getattr(config, name) is not None:
            option = f"--{name.replace('_', '-')}"
            raise UsageError(f"{option} leaves nothing to select", "drop it, or --select")
    # heads are ranked on generated rows around a text of the package
    if config.by == "layer" and not (config.select_data or config.calibrate):
        raise UsageError(
            f"--select {config.select} measures on text and has none",
            "give --select-data DATA" + ("" if config.mixers_from else " or --calibrate DATA"),
        )


def _check_choice(config: ConvertConfig) -> None:
    """Raise UsageError for a choice of heads where layers are replaced, or of layers for heads."""
    if config.keep_heads is not None and config.by != "head":
        raise UsageError(
            f"--keep-heads chooses KV heads, and --by {config.by} replaces whole layers",
            "add --by head, or give --keep-attention",
        )
    if config.keep_attention is not None and config.by != "layer":
        raise UsageError(
            f"--keep-attention chooses layers, and --by {config.by} replaces KV heads",
            "give --keep-heads LAYER.HEAD,..., or --by layer",
        )


def _not_with(config: ConvertConfig, option: str, able: Callable[[AnySpec], bool]) -> UsageError:
    known = [spec.name for spec in MIXERS.values() if able(spec)]
    return UsageError(
        f"{option} does not go with --mixer {config.mixer}", f"use --mixer {known[0]}"
    )


def _windowed_by(asked: ConvertConfig) -> str:
    """The option that asks for windows, as it was typed."""
    for given, option in (
        (asked.by_head, "--by head" if asked.by else "--keep-heads"),
        (asked.window, "--window"),
        (asked.form == "faithful", "--form faithful"),
        (asked.mixers_from, "--mixers-from (of mixers with windows)"),
    ):
        if given:
            return option
    return "a window"


def describe_form(config: ConvertConfig, target: HybridConfig) -> str:
    """Describe the form of a student and the engines that can load it, from completed options."""
    found = "a state alone, which rotates" if target.rotates else "a state alone"
    if target.windows:
        span = target.windows[0]
        found = f"a window of {span.window} tokens and {span.sinks} sinks beside the state"
    name = f"{config.form} form" if config.form else "form"
    return f"{name}, by {config.by}: {found}; {_engines(target)}"


def _engines(target: HybridConfig) -> str:
    if reasons := _beyond_granite(target):
        return f"mambactl alone runs it ({reasons[0]})"
    return "within what GraniteMoeHybrid expresses (transformers, vLLM, llama.cpp)"


def _beyond_granite(target: HybridConfig) -> list[str]:
    """Reasons why a GraniteMoeHybrid cannot express a model, empty if it can."""
    others = [name for name in dict.fromkeys(target.mixers) if not MIXERS[name].in_granite]
    inner = target.num_attention_heads * target.head_dim
    found = (
        (others, f"{' and '.join(others)} layers"),
        (target.rotates, "its states rotate"),
        (target.qk_norm, "its queries and keys have norms"),
        (target.post_norm, "its norms stand behind mixers"),
        (
            len({target.rotated(index) for index in target.attention_layers}) > 1,
            "only some of its attention has rotary positions",
        ),
        (not isinstance(target.attention_bias, bool), "its projections have biases in part"),
        (target.sliding_window, "its attention has a window of its own"),
        (inner % target.hidden_size, "its heads are no multiple of the hidden size"),
    )
    return [reason for holds, reason in found if holds]
