"""Copy of a model in training that decodes; new weights overwrite the old ones in place."""

from collections.abc import Collection, Iterator, Sequence
from copy import deepcopy
from dataclasses import fields, is_dataclass

import torch
from torch import Tensor

from mambactl.checkpoint.load import EMBEDDING, HEAD, empty_model
from mambactl.checkpoint.save import stored_dtype
from mambactl.decode.backend import make_engine
from mambactl.decode.engine import Generation
from mambactl.decode.gpu.fused_engine import FusedEngine
from mambactl.decode.gpu.state import PackedModel, pack
from mambactl.decode.sampler import SamplingParams
from mambactl.models.hybrid import HybridForCausalLM


class DecodingCopy:
    """A model's weights in `dtype`, packed once for decoding; `refresh` brings them up to date.

    `trained` names the parameters that change. The others share the original's memory where they
    have that type already and are no part of a stack. Blocks of the original that are compiled, or
    recompute their activations, stay out of decoding.
    """

    def __init__(self, original: HybridForCausalLM, trained: Collection[str], dtype: torch.dtype):
        self.model = _copied(original, trained, dtype)
        ours = dict(self.model.named_parameters())
        self._changing = [
            (ours[name], p) for name, p in original.named_parameters() if name in trained
        ]
        # what prompts begin with was read with the weights of then
        self._engine = make_engine(self.model, None, 0, share=False)

    def reserve(self, rows: int, tokens: int) -> None:
        """Decode all batches of up to `rows` rows of `tokens` tokens in the same memory."""
        if isinstance(self._engine, FusedEngine):
            self._engine.reserve(rows, tokens)

    @torch.no_grad()
    def refresh(self) -> None:
        """Take over the original's weights, one parameter after the other.

        Every tensor keeps its address: captured graphs read the new values.
        """
        if not self._changing:
            return
        for ours, theirs in self._changing:
            ours.copy_(theirs)
        if isinstance(self._engine, FusedEngine) and self._engine.packed is not None:
            packed, positions = self._engine.packed[0], self._engine.positions
            renew(packed, pack(self.model, positions))

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, keys: Sequence[int]
    ) -> Generation:
        """Continue every prompt with the weights of the last refresh; see `Engine.generate`."""
        return self._engine.generate(prompts, params, keys=keys)


@torch.no_grad()
def renew(kept: PackedModel, fresh: PackedModel) -> None:
    """Overwrite what is computed from weights (`-exp(A_log)`, padded taps) in place.

    Stacks are the weights themselves: `fresh` has the same memory there, and nothing is copied.
    """
    for ours, theirs in zip(tensors_of(kept), tensors_of(fresh), strict=True):
        if ours.data_ptr() != theirs.data_ptr():
            ours.copy_(theirs)


def tensors_of(part: object) -> Iterator[Tensor]:
    """Yield every tensor that a decode pass reads of a packed model, or of a part of it."""
    if isinstance(part, Tensor):
        yield part
    elif isinstance(part, tuple):
        for each in part:
            yield from tensors_of(each)
    elif is_dataclass(part):
        for field in fields(part):
            yield from tensors_of(getattr(part, field.name))


def _copied(
    original: HybridForCausalLM, trained: Collection[str], dtype: torch.dtype
) -> HybridForCausalLM:
    """The model in eval mode without gradients, in memory of its own for what is `trained`."""
    state = {}
    for name, parameter in original.named_parameters():
        own = parameter.detach()
        kind = stored_dtype(name, dtype)
        state[name] = own.to(kind, copy=name in trained)
    # a stage may have put others in the place of mixers, of which the copy knows nothing
    copy = empty_model(deepcopy(original.config))
    if copy.config.tie_word_embeddings:
        state[HEAD] = state[EMBEDDING]
    copy.load_state_dict(state, strict=True, assign=True)
    copy.tie_weights()
    return copy.to(original.device).requires_grad_(False).eval()
