"""Refusals before anything heavy is loaded: options, names and files that are wrong."""

import gc
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache

from mambactl import console
from mambactl.checkpoint.opening import require_container
from mambactl.checkpoint.resolve import called_teacher, require_named, resolve
from mambactl.commands import Command
from mambactl.data.row_files import require_prompts, require_there
from mambactl.errors import ModelError
from mambactl.kernels.switch import FORCED, SWITCH, forced, switch
from mambactl.options import StageConfig
from mambactl.speed.shape_table import require_shapes

# of what every stage imports, the part that takes seconds
HEAVY = "torch"
LOADING = "loading torch and transformers"


def require_found(config: StageConfig, sources: Sequence[str | None]) -> None:
    """Raise for what is wrong with a command line whatever its files hold; torch is not needed.

    UsageError for options that exclude each other and for data that is not there, ModelError for a
    model that cannot be found: MODEL, which is fetched where need be, and those of other options,
    of which only what lies on this disk is looked for.
    """
    config.require_coherent()
    require_models(sources)
    for option, spec in config.other_models:
        if option == "teacher":
            with called_teacher():
                require_named(spec)
            continue
        try:
            require_named(spec)
        except ModelError as error:
            raise ModelError(f"--{option.replace('_', '-')}: {error}", error.hint) from error
    for spec in config.named_data:
        require_there(spec)
    if prompts := getattr(config, "prompts", None):
        require_prompts(prompts)


def require_known(command: Command, config: StageConfig, source: str | None) -> None:
    """Raise UsageError for an unknown synthetic model, or another word in MAMBACTL_KERNELS."""
    switch()
    require_shapes([*config.shapes, *([source] if source and command.model == "shape" else [])])


def warn_of_unused_kernels(config: StageConfig) -> None:
    """Warn where MAMBACTL_KERNELS asks for what the device has not; torch is loaded already."""
    import torch

    if forced() and (config.device == "cpu" or not torch.cuda.is_available()):
        console.warn(f"{SWITCH}={FORCED} changes nothing on a CPU, where the reference computes")


def require_models(sources: Sequence[str | None]) -> None:
    """Find every model, fetching it where need be; raises ModelError for one that is not there."""
    for source in filter(None, sources):
        require_container(resolve(source))


@cache
def announce() -> None:
    """Say once that seconds of imports follow, unless a command before did them."""
    if HEAVY not in sys.modules:
        console.log(LOADING)


@contextmanager
def loading() -> Iterator[None]:
    """Announce seconds of imports, and let those inside pass without a search for garbage.

    What is imported stays, and searches among all of it would take a fifth of the time: it is not
    searched later either. Later imports are as usual.
    """
    announce()
    with console.doing(LOADING):
        if HEAVY in sys.modules or not gc.isenabled():
            yield
            return
        gc.disable()
        try:
            yield
        finally:
            gc.freeze()
            gc.enable()
