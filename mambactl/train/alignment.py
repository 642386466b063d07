"""Every new mixer learns to answer like the attention it replaces, from the teacher's own input.

Teacher-forced: layer i's mixer gets the hidden state that entered the teacher's attention (after
the input norm) and must give what left its o_proj. Layers do not see each other, so one teacher
pass trains all of them, and each layer's graph is gone before the next one starts.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from mambactl.data.pack import Batch
from mambactl.models.config import HybridConfig
from mambactl.models.hybrid import HybridForCausalLM
from mambactl.train.objectives import autocast, last_hidden


class AlignmentObjective:
    """Mean over layers of the masked squared error divided by that layer's teacher variance.

    A loss of 1 is what a mixer that only outputs the mean would get. Raises ValueError when the
    teacher has no attention in a replaced layer, or another number of layers or width.
    """

    def __init__(
        self,
        student: HybridForCausalLM,
        teacher: HybridForCausalLM,
        amp: torch.dtype | None = None,
    ):
        problem = misfit(student.config, teacher.config)
        if problem:
            raise ValueError(problem)
        self.teacher, self.amp = teacher, amp
        self.layers = replaced_layers(student.config)
        self.mixers = {index: student.model.layers[index].mixer for index in self.layers}

    def count(self, batch: Batch) -> int:
        """Tokens that are not padding."""
        return int(batch.valid.sum())

    def backward(self, batch: Batch, tokens: int) -> Tensor:
        """One teacher pass; every layer's gradient is made while the pass is at that layer."""
        shares: list[Tensor] = []
        handles = [
            self.teacher.model.layers[index].self_attn.register_forward_hook(
                self._hook(mixer, batch.valid, tokens, shares)
            )
            for index, mixer in self.mixers.items()
        ]
        try:
            with torch.no_grad(), autocast(batch.input_ids.device, self.amp):
                last_hidden(self.teacher, batch)
        finally:
            for handle in handles:
                handle.remove()
        return torch.stack(shares).sum()

    def _hook(
        self, mixer: nn.Module, valid: Tensor, tokens: int, shares: list[Tensor]
    ) -> Callable[[nn.Module, tuple, Tensor], None]:
        def align(_: nn.Module, args: tuple, wanted: Tensor) -> None:
            hidden, context, _ = args
            with torch.enable_grad():
                error = relative_error(mixer(hidden.detach(), context, None), wanted, valid)
                share = error / (tokens * len(self.mixers))
            # the pass around this runs under autocast, which a backward pass must not
            with torch.autocast(hidden.device.type, enabled=False):
                share.backward()
            shares.append(share.detach())

        return align


def relative_error(got: Tensor, wanted: Tensor, valid: Tensor) -> Tensor:
    """Sum over valid tokens of the mean squared error over the wanted output's variance.

    got, wanted [B, T, D]; valid [B, T]; fp32 scalar.
    """
    got, wanted = got[valid].float(), wanted[valid].float()  # [N, D]
    return (got - wanted).square().mean(-1).sum() / wanted.var(correction=0)


def replaced_layers(config: HybridConfig) -> list[int]:
    """Indices of the layers that mix with Mamba."""
    return [i for i, name in enumerate(config.mixers) if name != "attention"]


def misfit(ours: HybridConfig, theirs: HybridConfig) -> str | None:
    """Why a student of the first form cannot be aligned with a teacher of the second, or None."""
    for what, field in (("layers", "num_hidden_layers"), ("hidden units", "hidden_size")):
        if getattr(ours, field) != getattr(theirs, field):
            return (
                f"the teacher has {getattr(theirs, field)} {what}, "
                f"the student {getattr(ours, field)}"
            )
    missing = [i for i in replaced_layers(ours) if theirs.mixers[i] != "attention"]
    return f"the teacher has no attention in the layers {missing}" if missing else None
