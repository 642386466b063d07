"""Published shapes of models as plain numbers, by the names that `--synthetic` takes."""

from collections.abc import Iterable
from dataclasses import dataclass

from mambactl.errors import UsageError
from mambactl.foreign import excerpt


@dataclass(frozen=True)
class LlamaShape:
    """Attention alone; `heads` of queries and of keys. A `tied` head is the embedding."""

    hidden: int
    layers: int
    heads: tuple[int, int]
    intermediate: int
    vocabulary: int = 128_256
    tied: bool = False


@dataclass(frozen=True)
class HybridShape:
    """A Llama with a share `ratio` of its attention replaced, in the shapes of arXiv 2408.15237.

    With `window` attention to so many tokens stays beside each Mamba-2 mixer, and with `heads`
    these KV heads of its layer keep full attention.
    """

    base: LlamaShape
    ratio: float
    mixer: str = "mamba2"
    window: int = 0
    rotary: bool = False
    heads: tuple[int, ...] = ()

    @property
    def tied(self) -> bool:
        """True if the head is the embedding."""
        return self.base.tied


@dataclass(frozen=True)
class NativeShape:
    """Recurrent mixers alone."""

    mixer: str
    hidden: int
    layers: int
    vocabulary: int
    tied: bool


Shape = LlamaShape | HybridShape | NativeShape


def _mamba1(hidden: int, layers: int, vocabulary: int = 50_280, tied: bool = True) -> NativeShape:
    return NativeShape("mamba1", hidden, layers, vocabulary, tied)


def _mamba2(hidden: int, layers: int, vocabulary: int = 50_288, tied: bool = True) -> NativeShape:
    return NativeShape("mamba2", hidden, layers, vocabulary, tied)


_LLAMA3_8B = LlamaShape(4096, 32, (32, 8), 14336)
_LLAMA3_70B = LlamaShape(8192, 80, (64, 8), 28672)
_SMOLLM2 = LlamaShape(576, 30, (9, 3), 1536, 49_152, tied=True)
_TINY = LlamaShape(64, 3, (4, 2), 128, 512)

TABLE: dict[str, Shape] = {
    "mamba-130m": _mamba1(768, 24),
    "mamba-370m": _mamba1(1024, 48),
    "mamba-790m": _mamba1(1536, 48),
    "mamba-1.4b": _mamba1(2048, 48),
    "mamba-2.8b": _mamba1(2560, 64),
    "mamba2-130m": _mamba2(768, 24),
    "mamba2-1.3b": _mamba2(2048, 48),
    "mamba2-2.7b": _mamba2(2560, 64),
    "llama3-8b": _LLAMA3_8B,
    "llama3-8b-hybrid-50": HybridShape(_LLAMA3_8B, 0.5),
    "llama3-8b-hybrid-87.5": HybridShape(_LLAMA3_8B, 0.875),
    "llama3-8b-hybrid-50-window": HybridShape(_LLAMA3_8B, 0.5, window=64),
    "llama3-8b-hybrid-75-window": HybridShape(_LLAMA3_8B, 0.75, window=64),
    "llama3-8b-hybrid-87.5-window": HybridShape(_LLAMA3_8B, 0.875, window=64),
    # a quarter of the KV heads of every layer
    "llama3-8b-heads-75": HybridShape(_LLAMA3_8B, 1.0, window=64, heads=(2, 5)),
    "llama3-8b-hybrid-50-mamba1": HybridShape(_LLAMA3_8B, 0.5, "mamba1"),
    "llama3-8b-hybrid-87.5-mamba1": HybridShape(_LLAMA3_8B, 0.875, "mamba1"),
    "llama3-70b": _LLAMA3_70B,
    "llama3-70b-hybrid-50": HybridShape(_LLAMA3_70B, 0.5),
    "smollm2-135m": _SMOLLM2,
    "smollm2-135m-hybrid-50": HybridShape(_SMOLLM2, 0.5),
    "smollm2-135m-hybrid-50-window": HybridShape(_SMOLLM2, 0.5, window=64),
    "smollm2-135m-hybrid-87.5-window": HybridShape(_SMOLLM2, 0.875, window=64),
    # one of the three KV heads of every layer
    "smollm2-135m-heads-67": HybridShape(_SMOLLM2, 1.0, window=64, heads=(1,)),
    # drafts for llama3-8b: few wide layers, at most 1 GB of bf16 read per token, head included
    "draft-llama3-2l": HybridShape(LlamaShape(2048, 2, (16, 8), 16384), 1.0),
    "draft-llama3-3l": HybridShape(LlamaShape(2048, 3, (16, 8), 9728), 1.0),
    # the head of a trimmed vocabulary leaves room for the target's own width
    "draft-llama3-2l-32k": HybridShape(LlamaShape(4096, 2, (32, 8), 9728, 32_000), 1.0),
    "tiny": _TINY,
    "tiny-mamba": _mamba1(64, 2, 512, tied=False),
    "tiny-mamba2": _mamba2(64, 2, 512, tied=False),
    "tiny-hybrid": HybridShape(_TINY, 0.5),
    "tiny-window": HybridShape(_TINY, 0.5, window=24),
    "tiny-heads": HybridShape(_TINY, 1.0, window=24, heads=(1,)),
    "tiny-rotary": HybridShape(_TINY, 1.0, window=24, rotary=True),
    "tiny-draft": HybridShape(LlamaShape(64, 2, (4, 2), 128, 512), 1.0),
}


def require_shapes(names: Iterable[str]) -> None:
    """Raise UsageError for the name of a model that nobody knows."""
    for name in names:
        if name not in TABLE:
            raise UsageError(f"no synthetic model {excerpt(name)}", f"known: {', '.join(TABLE)}")
