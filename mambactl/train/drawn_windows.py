"""Random window sizes in every step of training, so that states learn the tokens beyond any."""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from mambactl.errors import UsageError
from mambactl.models.config import HybridConfig
from mambactl.models.hybrid import HybridForCausalLM
from mambactl.models.mixers.windowed import WindowAttention


def with_window(config: HybridConfig, size: int | None) -> HybridConfig:
    """The configuration with windows of `size` tokens; None leaves them."""
    if size is None:
        return config
    changed = {}
    for index, layer in enumerate(config.layers):
        if (window := layer.spec.window(layer.settings)) is not None:
            settings = replace(layer.settings, mamba2_window=replace(window, window=size))
            changed[index] = layer.spec, settings
    return config.with_layers(changed)


class DrawnWindows:
    """Draws one of `sizes` for a step, by its name alone: a run that resumes draws the same.

    Raises UsageError for a model without windows. What is measured in between, and saved, has the
    windows of the configuration.
    """

    def __init__(self, model: HybridForCausalLM, sizes: Sequence[int], seed: int):
        self.model, self.sizes, self.seed = model, sorted(set(sizes)), seed
        self.windows = [part for part in model.modules() if isinstance(part, WindowAttention)]
        if not self.windows:
            raise UsageError(
                "--random-window draws the size of windows beside states, and this model has none",
                "drop --random-window, or convert with --window",
            )

    def draw(self, phase: str, step: int) -> int:
        """The size for a step of a phase."""
        return random.Random(f"window {self.seed} {phase} {step}").choice(self.sizes)

    @contextmanager
    def of(self, size: int) -> Iterator[None]:
        """Let every window see `size` tokens inside the block."""
        before, model = [part.span for part in self.windows], self.model.model
        for part in self.windows:
            part.span = part.span._replace(window=size)
        model.look({part.span for part in self.windows})
        try:
            yield
        finally:
            for part, span in zip(self.windows, before, strict=True):
                part.span = span
            model.look(set(before))
