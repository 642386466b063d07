"""Controls that put a student's number in perspective: the same teacher or student, made worse.

Both change what some mixers compute while a `with` block lasts, and copy no weight.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from mambactl.errors import UsageError
from mambactl.kernels.local_attention import local_mask
from mambactl.models.config import HybridConfig
from mambactl.models.hybrid import HybridForCausalLM
from mambactl.models.mixers.registry import ATTENTION, MIXERS
from mambactl.models.mixers.spec import StepContext
from mambactl.present import of_kind


@contextmanager
def windowed_attention(
    model: HybridForCausalLM,
    layers: Sequence[int] | Mapping[int, Sequence[int]],
    window: int,
    sinks: int,
) -> Iterator[None]:
    """The attention of `layers` sees the last `window` tokens and the first `sinks` of a document.

    With a mapping only those KV heads of each layer. The untrained control of a converted model
    (attention sinks: arXiv 2309.17453). Only without a cache. Raises UsageError for layers that
    have no attention.
    """
    every = tuple(range(model.config.num_key_value_heads))
    heads = layers if isinstance(layers, Mapping) else dict.fromkeys(layers, every)
    blocks = [model.model.layers[index] for index in heads]
    if missing := [block.index for block in blocks if block.mixer_name != ATTENTION.attribute]:
        raise UsageError(
            f"the teacher has no attention in the layers {missing} to put a window on",
            "compare with the model that was converted",
        )
    # layers with the same heads share a hook, and so its mask
    narrow = {
        chosen: Narrowed(window, sinks, chosen, model.config)
        for chosen in {tuple(chosen) for chosen in heads.values()}
    }
    handles = [
        block.mixer.register_forward_pre_hook(narrow[tuple(heads[block.index])]) for block in blocks
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Narrowed:
    """A hook on attention whose KV heads `chosen` then see a window alone.

    The mask is made once per forward call.
    """

    def __init__(self, window: int, sinks: int, chosen: Sequence[int], config: HybridConfig):
        self.window, self.sinks = window, sinks
        count = config.num_key_value_heads
        shared = config.num_attention_heads // count
        narrow = torch.tensor([head in chosen for head in range(count)])
        # query heads that see the window, None where all do
        self.narrow = None if bool(narrow.all()) else narrow.repeat_interleave(shared)
        self.last: tuple[StepContext, StepContext] | None = None

    def __call__(self, _: nn.Module, arguments: tuple[object, ...]) -> tuple[object, ...]:
        first, second, cache = arguments
        hidden, context = of_kind(Tensor, first), of_kind(StepContext, second)
        if cache is not None:
            raise ValueError("a windowed control keeps no cache")
        if self.last is None or self.last[0] is not context:
            length, device = hidden.shape[1], hidden.device
            mask = local_mask(length, self.window, self.sinks, context.seq_idx, device)
            if self.narrow is not None:
                heads = self.narrow.to(device)[:, None, None]  # [H, 1, 1]
                mask = torch.where(heads, mask, _seen(context, length, device))
            self.last = (context, replace(context, mask=mask, spans=None))
        return hidden, self.last[1], cache


def _seen(context: StepContext, length: int, device: torch.device) -> Tensor:
    """Keys that whole rows see as they are, [B or 1, 1, T, T]."""
    if context.mask is not None:
        return context.mask
    if context.spans is not None:
        return context.spans.mask()
    return torch.ones(1, 1, length, length, dtype=torch.bool, device=device).tril()


@contextmanager
def ablated(model: HybridForCausalLM, branch: str) -> Iterator[None]:
    """Every recurrence, `attention` or `window` puts out zero; UsageError if there is none.

    `attention` is that of whole layers and of kept heads. A window beside a recurrence stays when
    the recurrence is silenced, and the other way round.
    """
    require_branch(model.config.mixers, branch)
    parts = [
        block.mixer.get_submodule(layer.spec.branches[branch])
        for block, layer in zip(model.model.layers, model.config.layers, strict=True)
        if branch in layer.spec.branches
    ]
    handles = [part.register_forward_hook(_silence) for part in parts]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def require_branch(mixers: Sequence[str], branch: str) -> None:
    """Raise UsageError unless a model of these mixers has what `ablated` would silence."""
    if not any(branch in MIXERS[name].branches for name in mixers):
        found = ", ".join(sorted(set(mixers)))
        raise UsageError(f"the model has no {branch} layer to ablate", f"its layers are {found}")


def _silence(_: nn.Module, arguments: tuple[object, ...], output: Tensor) -> Tensor:
    return torch.zeros_like(output)
